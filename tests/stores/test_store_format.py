"""The format of a store (docs/store.md) is pinned byte by byte, and other Parquet readers open it."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuselm.stores import store
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, Trace
from fuselm.system import manifest

GOLDEN = Path(__file__).parents[1] / "data" / "store"


def golden_traces() -> list[Trace]:
    """Return rows of 0, 1, 2, 5 and 70 entries, and three with two drawn; impossible gold, no tail, no information,
    no tokens, two sources.
    """
    rows = [{}, {3: 1.0}, {11: 0.25, 2: 0.625}, {n: 2.0 ** -(n + 1) for n in range(5)}, {n: 0.01 for n in range(70)}]
    rows.append({5: 0.0, 9: 0.75, 13: 0.0})  # of 5 and 13 it is not known how probable they are
    gold = [0.0, 0.0, math.log(0.625), -math.inf, -7.3, -2.5]

    def trace(document: str, chosen: list[int], text: str) -> Trace:
        return Trace(
            document=document,
            text=store.fingerprint_text(text),
            size=len(text.encode()),
            nats=12.5 * len(chosen),
            tokens=np.array([7 * i + 2 for i in chosen], np.int32),
            starts=np.array([2 * n - 1 for n in range(len(chosen))], np.int32),
            distributions=Distributions(
                offsets=np.cumsum([0, *(len(rows[i]) for i in chosen)]).astype(np.int64),
                ids=np.array([token for i in chosen for token in rows[i]], np.int32),
                logprobs=np.array([logs(p) for i in chosen for p in rows[i].values()], np.float32),
                gold=np.array([gold[i] for i in chosen], np.float32),
                tail=np.array([1 - sum(rows[i].values()) for i in chosen], np.float32),
            ),
            weights=np.tile(np.array([0.3, 0.7], np.float32), (len(chosen), 1))
            if chosen
            else np.zeros((0, 0), np.float32),
        )

    return [trace("b", [2, 3, 5, 4], "zwölf"), trace("a", [0, 1], "abc"), trace("ü", [], "")]


def logs(p: float) -> float:
    return math.log(p) if p else -math.inf


def write(folder: Path) -> None:
    recipe = manifest.Recipe(stage="capture", parameters={"policy": "top_k", "top_k": 70}, inputs={"model": "0f"})
    manifest.build_once(folder, recipe, lambda out: store.write_parts(out, golden_traces()))


def values(folder: Path) -> list[dict]:
    """Return everything that a reader gets, for JSON."""
    return [
        {
            "document": t.document,
            "text": t.text,
            "bytes": t.size,
            "nats": t.nats,
            "tokens": t.tokens.tolist(),
            "starts": t.starts.tolist(),
            "offsets": t.distributions.offsets.tolist(),
            "ids": t.distributions.ids.tolist(),
            "logprobs": [round(float(x), 5) for x in t.distributions.logprobs],
            "gold": [str(x) for x in t.distributions.gold],
            "tail": [round(float(x), 5) for x in t.distributions.tail],
            "weights": t.weights.tolist(),
        }
        for t in Store(folder)
    ]


def test_a_store_of_this_format_is_read_for_ever():
    assert values(GOLDEN) == json.loads((GOLDEN.parent / "store.json").read_text())


def test_the_same_traces_make_the_golden_bytes(tmp_path):
    """Return the bytes of all pages; the footer holds the version of the library that wrote it."""
    write(tmp_path / "store")
    for name in ("part-00000.parquet", store.INDEX):
        one, other = (pages((folder / name).read_bytes()) for folder in (GOLDEN, tmp_path / "store"))
        assert one == other, name
        assert pq.read_schema(GOLDEN / name).equals(pq.read_schema(tmp_path / "store" / name), check_metadata=True)
    one, other = (manifest.read(folder) for folder in (GOLDEN, tmp_path / "store"))
    for recorded in (one, other):
        del recorded["seconds"]
        recorded["files"] = sorted(recorded["files"])
    assert one == other


def pages(data: bytes) -> bytes:
    return data[: len(data) - 8 - int.from_bytes(data[-8:-4], "little")]


def test_drawn_entries_share_the_tail_or_are_left_out():
    for draws, expected in [(True, {9: 0.75, 5: 0.125, 13: 0.125}), (False, {9: 0.75})]:
        d = Store(GOLDEN, draws=draws).read("b").distributions
        ids, logprobs = d.row(2)
        assert ids.tolist() == list(expected)
        np.testing.assert_allclose(np.exp(logprobs), list(expected.values()), atol=0.003)
        np.testing.assert_allclose(d.tail[2], 0 if draws else 0.25, atol=0.003)
        assert ids.tolist() != d.row(3)[0].tolist() and len(d.row(3)[0]) == 70


def test_the_manifest_has_the_hash_of_each_file():
    files = manifest.read(GOLDEN)["files"]
    assert files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in GOLDEN.iterdir()
        if path.name != "manifest.json"
    }


def test_a_folder_of_another_format_is_refused(tmp_path):
    write(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match=r"written in format 1, this fuselm reads 3; run the stage again$"):
        Store(tmp_path / "store")


COLUMNS = ["document", "bytes", "tokens", "ids", "logprobs", "tail"]


def by_pyarrow(path: Path) -> list[dict]:
    return pq.read_table(path, columns=COLUMNS).to_pylist()


def by_polars(path: Path) -> list[dict]:
    return pytest.importorskip("polars").read_parquet(path, columns=COLUMNS).to_dicts()


def by_duckdb(path: Path) -> list[dict]:
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.connect().execute(f"SELECT {', '.join(COLUMNS)} FROM '{path}'")
    return [dict(zip(COLUMNS, row, strict=True)) for row in found.fetchall()]


def by_pandas(path: Path) -> list[dict]:
    rows = pytest.importorskip("pandas").read_parquet(path, columns=COLUMNS).to_dict("records")
    return [{name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in row.items()} for row in rows]


def by_datasets(path: Path) -> list[dict]:
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"), keep_in_memory=True)
    return found.select_columns(COLUMNS).to_list()


@pytest.mark.parametrize("read", [by_pyarrow, by_polars, by_duckdb, by_pandas, by_datasets])
def test_any_reader_of_parquet_opens_it(tmp_path, read):
    write(tmp_path / "store")
    expected = store.build_table(golden_traces()).select(COLUMNS).to_pylist()
    assert read(store.part_path(tmp_path / "store", 0)) == expected
    for row in expected:
        assert row["ids"] == [
            token for trace in golden_traces() if trace.document == row["document"] for token in sorted_ids(trace)
        ]


def sorted_ids(trace: Trace) -> list[int]:
    d = trace.distributions
    return [token for i in range(len(d)) for token in sorted(d.row(i)[0].tolist())]


def test_rows_may_be_copied_as_they_are(tmp_path):
    write(tmp_path / "store")
    (tmp_path / "copy").mkdir()
    store.write_tables(store.part_path(tmp_path / "copy", 0), Store(tmp_path / "store").read_tables())
    one, other = (pq.read_table(store.part_path(tmp_path / name, 0)) for name in ("store", "copy"))
    assert one.equals(other) and isinstance(one, pa.Table)
