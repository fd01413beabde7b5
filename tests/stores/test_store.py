"""store.py: a store reads back what was written, and names the file that is damaged."""

import drawn
import numpy as np
import pytest

from fuselm.stores import store
from fuselm.stores.rows import Trace, build_table, read_traces
from fuselm.stores.store import Store, part_path, write_index, write_part, write_parts
from fuselm.system.manifest import Recipe, build_once

TEXTS = {"first": "abba", "second": "", "third": "a b\u00e9 b", "fourth": " "}


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    vocabulary, random = drawn.byte_pairs([(0, 1), (2, 0)]), np.random.default_rng(0)
    return [drawn.trace_of(vocabulary, text, random, top_k=3, document=name) for name, text in TEXTS.items()]


@pytest.fixture
def folder(tmp_path, traces):
    def build(partial):
        write_part(partial, 0, traces[:3])
        write_part(partial, 1, traces[3:])
        return write_index(partial)

    build_once(tmp_path / "store", Recipe(stage="capture"), build)
    return tmp_path / "store"


def stored(trace: Trace) -> Trace:
    """Return a trace as it comes back from the disk; tests/stores/test_rounding.py says how near that is."""
    return read_traces(build_table([trace]))[0]


def assert_equal(one: Trace, other: Trace) -> None:
    assert (one.document, one.text, one.size, one.nats) == (other.document, other.text, other.size, other.nats)
    for name in ("tokens", "starts", "weights"):
        assert_same_array(getattr(one, name), getattr(other, name), name)
    for name in ("offsets", "ids", "logprobs", "gold", "tail"):
        assert_same_array(getattr(one.distributions, name), getattr(other.distributions, name), name)


def assert_same_array(one: np.ndarray, other: np.ndarray, name: str) -> None:
    assert one.dtype == other.dtype, name
    assert one.shape == other.shape, name
    assert np.array_equal(one, other), name


def test_a_store_reads_back_what_was_written(folder, traces):
    found = Store(folder)
    assert found.documents == list(TEXTS) and len(found) == len(TEXTS)
    assert "first" in found and "fifth" not in found
    for trace in traces:
        assert_equal(found.read(trace.document), stored(trace))
    assert [trace.document for trace in found] == found.documents
    for trace, read in zip(traces[::-1], found.read_many(list(TEXTS)[::-1]), strict=True):
        assert_equal(read, stored(trace))
    assert found.manifest["stage"] == "capture"
    tokens, entries = (
        sum(map(len, column)) for column in zip(*((t.tokens, t.distributions.ids) for t in traces), strict=True)
    )
    assert found.manifest["counts"] == {"documents": len(traces), "tokens": tokens, "entries": entries}


def test_gold_log_probabilities_are_those_of_whole_traces(folder, traces):
    found = Store(folder)
    for trace in map(found.read, found.documents):
        gold, informed = found.read_gold(trace.document)
        np.testing.assert_array_equal(gold, trace.distributions.gold)
        np.testing.assert_array_equal(informed, trace.distributions.informed)


def test_a_folder_may_be_a_string_in_the_users_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert [trace.document for trace in Store("~/store")] == list(TEXTS)


def test_weights_and_impossible_golds_are_read_back(tmp_path, traces):
    from dataclasses import replace

    trace = traces[2]
    gold = trace.distributions.gold.copy()
    gold[1] = -np.inf
    weights = np.arange(3 * len(gold), dtype=np.float32).reshape(-1, 3)
    changed = replace(trace, weights=weights, distributions=replace(trace.distributions, gold=gold))
    build_once(tmp_path / "store", Recipe(stage="fuse"), lambda partial: write_parts(partial, [changed]))
    read = Store(tmp_path / "store").read(trace.document)
    assert_equal(read, stored(changed))
    assert_same_array(read.weights, weights, "weights")
    assert np.isneginf(read.distributions.gold).tolist() == np.isneginf(gold).tolist()


def test_the_same_traces_make_the_same_bytes(tmp_path, traces):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_part(tmp_path / name, 0, traces)
    assert part_path(tmp_path / "one", 0).read_bytes() == part_path(tmp_path / "other", 0).read_bytes()


def test_an_empty_store_has_no_documents(tmp_path):
    build_once(tmp_path / "store", Recipe(stage="capture"), write_index)
    assert len(Store(tmp_path / "store")) == 0


def test_a_document_that_is_not_there_is_a_key_error(folder):
    with pytest.raises(KeyError, match="fifth"):
        Store(folder).read("fifth")


def message(folder) -> str:
    """Return the message of the `ValueError` that opening and reading all of a store raises."""
    with pytest.raises(ValueError) as caught:
        list(Store(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_store_is_named(tmp_path):
    assert message(tmp_path) == f"{tmp_path}: not a finished stage (no manifest.json); run `fuselm run` again"


def test_a_store_without_its_manifest_is_named(folder):
    (folder / "manifest.json").unlink()
    assert message(folder).startswith(f"{folder}: not a finished stage")


@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_file_that_was_cut_off_is_named(folder, kept):
    path = part_path(folder, 0)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert message(folder).startswith(f"{path}: not a readable Parquet file (")
    assert message(folder).endswith(f"); `fuselm store verify {folder}` says what is left")


def test_any_flipped_bit_is_found_or_does_no_harm(folder, traces):
    path = part_path(folder, 0)
    data = path.read_bytes()
    found = harmless = 0
    for position in np.random.default_rng(0).choice(len(data), 307, replace=False):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            read = {trace.document: trace for trace in Store(folder)}
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        else:
            assert read.keys() == TEXTS.keys(), position
            for trace in traces:
                assert_equal(read[trace.document], stored(trace))
            harmless += 1
    assert found > harmless


def test_a_part_that_fails_to_be_written_leaves_nothing(tmp_path, traces, monkeypatch):
    def fail(writer, table, **options):
        raise OSError("disk full")

    monkeypatch.setattr(store.pq.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_part(tmp_path, 0, traces)
    assert list(tmp_path.iterdir()) == []
