"""verification.py: each kind of damage, done to real files, is named with its file and the documents that remain."""

import json
import shutil
from pathlib import Path

import drawn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from rich.console import Console
from tiny_run import fuselm

from fuselm.alignment.choices import METHODS
from fuselm.stores import store
from fuselm.stores.rows import read_traces
from fuselm.stores.store import part_path, write_index, write_part
from fuselm.stores.verification import verify_store
from fuselm.system import atomic_files, manifest
from fuselm.system.manifest import Recipe, build_once
from fuselm.system.progress import Progress

PARTS = {0: ("a", "b", "c"), 1: ("d", "e")}
QUIET = Progress(Console(quiet=True), "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    vocabulary, random = drawn.byte_pairs([(0, 1), (2, 0)]), np.random.default_rng(0)

    def build(partial):
        for number, names in PARTS.items():
            traces = [drawn.trace_of(vocabulary, "ab é" * 7 + n, random, top_k=3, document=n) for n in names]
            write_part(partial, number, traces)
        return write_index(partial)

    folder = tmp_path_factory.mktemp("whole") / "store"
    build_once(folder, Recipe(stage="capture"), build)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "store")


def lines(folder) -> list[str]:
    return [str(problem).replace(f"{folder}/", "") for problem in verify_store(folder, progress=QUIET).problems]


def test_a_whole_store_has_no_problems(whole):
    verdict = verify_store(whole, progress=QUIET)
    assert verdict.problems == () and verdict.lost == () and verdict.kept == ("a", "b", "c", "d", "e")


def test_the_golden_store_is_whole():
    golden = Path(__file__).parents[1] / "data" / "store"
    assert verify_store(golden, progress=QUIET).problems == ()


@pytest.fixture(scope="module")
def captured_run(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = tiny_run.short(texts)
    return tiny_run.write(folder, target=byte_level, sources={"other": sentence_piece}, rows=rows)


@pytest.mark.parametrize("method", METHODS)
def test_what_every_method_aligns_is_whole(captured_run, method):
    assert fuselm("align", captured_run, f"align.method={method}").code == 0
    folders = (captured_run.parent / "out" / "align").glob("other-*")
    (made,) = (f for f in folders if manifest.read(f)["parameters"]["method"] == method)
    outcome = fuselm("store", "verify", made)
    assert outcome.code == 0, outcome.out


@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_truncated_part_costs_its_own_documents(folder, kept):
    path = part_path(folder, 0)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    found = lines(folder)
    assert found[0] == "part-00000.parquet: checksum differs, it is not the file that was written"
    assert found[1].startswith("part-00000.parquet: not a readable Parquet file (")
    assert found[1].endswith("; lost: 3 documents (a, b, c)") and len(found) == 2
    verdict = verify_store(folder, progress=QUIET)
    assert verdict.kept == ("d", "e") and verdict.lost == ("a", "b", "c")


def test_any_flipped_bit_is_found_and_kept_documents_are_unchanged(folder):
    path = part_path(folder, 0)
    data = path.read_bytes()
    before = {t.document: t for t in store.Store(folder)}
    for position in np.random.default_rng(0).choice(len(data), 101, replace=False):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        verdict = verify_store(folder, progress=QUIET)
        assert verdict.problems and all(p.path == path or p.path.name == store.INDEX for p in verdict.problems)
        assert set(verdict.kept) | set(verdict.lost) >= set(before) and {"d", "e"} <= set(verdict.kept)
        if "a" in verdict.kept:
            (read,) = [t for table in store.Store(folder, salvage=True).read_tables(["a"]) for t in read_traces(table)]
            assert np.array_equal(read.distributions.logprobs, before["a"].distributions.logprobs)


def test_a_missing_part_costs_its_own_documents(folder):
    part_path(folder, 1).unlink()
    assert lines(folder) == ["part-00001.parquet: is missing; lost: 2 documents (d, e)"]


def test_files_that_are_not_in_the_manifest_are_named(folder):
    shutil.copy(part_path(folder, 0), part_path(folder, 7))
    (folder / "notes.txt").write_text("")
    assert lines(folder) == [
        f"{name}: is not in the manifest; nothing reads it, move it away"
        for name in ("notes.txt", "part-00007.parquet")
    ]
    assert len(verify_store(folder, progress=QUIET).kept) == 5


def test_a_store_without_its_index_still_has_every_document(folder):
    (folder / store.INDEX).unlink()
    assert lines(folder) == ["index.parquet: is missing"]
    assert len(verify_store(folder, progress=QUIET).kept) == 5
    (folder / store.INDEX).write_bytes(b"PAR1")
    assert len(lines(folder)) == 2 and len(verify_store(folder, progress=QUIET).kept) == 5


def test_an_index_that_contradicts_its_parts_is_named(folder):
    index = pq.read_table(folder / store.INDEX)
    column = index["bytes"].to_pylist()
    column[1] += 1
    place = index.schema.get_field_index("bytes")
    index = index.set_column(place, store.INDEX_SCHEMA.field("bytes"), pa.array(column, pa.int32()))
    pq.write_table(index, folder / store.INDEX)
    assert "index.parquet: says another thing of document b" in lines(folder)


def test_a_store_without_a_manifest_cannot_be_verified(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"not a finished stage \(no manifest.json\)"):
        verify_store(folder, progress=QUIET)


BROKEN = {  # the last values of columns
    "a tail is no probability": {"tail": [2.0]},
    "an entry was drawn from a tail of 0": {"tail": [0.0], "logprobs": [-np.inf]},
    "entries and tail do not sum to 1": {"logprobs": [0.0, 0.0, 0.0]},
    "ids are not ascending, each once in a row": {"ids": [5, 4, 6]},
    "a log-probability is above 0": {"gold": [0.25]},
    "tokens begin outside the text, or not in order": {"starts": [1000]},
    "a token is below 0": {"tokens": [-3]},
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_row_that_breaks_a_rule_is_named_though_its_checksum_fits(folder, rule):
    """Write a store as a program with a mistake would."""
    path = part_path(folder, 0)
    table = pq.read_table(path)
    for name, values in BROKEN[rule].items():
        rows = table[name].to_pylist()
        rows[1] = rows[1][: -len(values)] + values
        kind = store.SCHEMA.field(name)
        table = table.set_column(table.schema.get_field_index(name), kind, pa.array(rows, kind.type))
    store.write_tables(path, [table])
    made = manifest.read(folder)
    made["files"][path.name] = atomic_files.hash_file(path)
    atomic_files.write_text(folder / "manifest.json", json.dumps(made))
    assert lines(folder) == [f"part-00000.parquet: document b: {rule}; lost: 1 documents (b)"]
    assert verify_store(folder, progress=QUIET).kept == ("a", "c", "d", "e")
