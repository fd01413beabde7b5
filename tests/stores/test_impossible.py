"""Refuse stores whose hashes are right and whose rows, documents, index or manifest hold an impossible value.

`store verify` names each, and so does whatever reads one; a run refuses it in one line before any number of it counts.
"""

import json
import math
import re

import numpy as np
import pytest
import tiny_run
from tampered import take_apart, tamper
from tiny_run import fuselm

from fuselm.stores import store
from fuselm.stores.store import Store
from fuselm.stores.verification import verify_store
from fuselm.system import manifest

HUGE = 50_000_000


def set_last(name, value):
    """Return a change that sets the last value of a column of one row."""

    def change(contents):
        contents.row()[name][-1] = value

    return change


def set_all(name, value):
    def change(contents):
        for row in contents.rows:
            row[name] = [value] * len(row[name])

    return change


def set_field(name, value):
    return lambda contents: contents.row().__setitem__(name, value)


def set_index(name, value):
    return lambda contents: contents.index[1].__setitem__(name, value)


def set_count(name, value):
    return lambda contents: contents.made["counts"].__setitem__(name, value)


def repeat_an_id(contents):
    row = contents.row()
    n = next(n for n, count in enumerate(row["counts"]) if count > 1)
    at = sum(row["counts"][:n])
    row["ids"][at + 1] = row["ids"][at]


def repeat_a_document(contents):
    contents.parts[0].append(dict(contents.parts[0][0]))


def cut_tokens(contents):
    """Leave out the last token of a document, with its row."""
    row = contents.row()
    count = row["counts"].pop()
    for name in ("tokens", "starts", "tail"):
        row[name].pop()
    row["nats"] += row["gold"].pop()
    for name in ("ids", "logprobs"):
        row[name] = row[name][: len(row[name]) - count]


def swap_rows_in_the_index(contents):
    one, other = contents.index[0], contents.index[1]
    one["row"], other["row"] = other["row"], one["row"]


def other_tokens(contents):
    """Give a document tokens that no tokenizer makes: each becomes the token before it."""
    row = contents.row()
    row["tokens"] = row["tokens"][1:] + row["tokens"][:1]
    for n in range(len(row["counts"])):  # so that no entry is gold
        row["gold"][n] = -20.0
    row["nats"] = 20.0 * len(row["gold"])


def draw_gold(contents):
    """Mark the entry of a token that came as drawn."""
    for row in contents.rows:
        owners = [token for token, count in zip(row["tokens"], row["counts"], strict=True) for _ in range(count)]
        for n, (token, entry) in enumerate(zip(owners, row["ids"], strict=True)):
            if token == entry and row["logprobs"][n] < -2:
                row["logprobs"][n] = -math.inf
                return


def draw_beside_gold(contents):
    """Mark an entry as drawn in a row whose own token is not among the entries."""
    row = contents.row()
    begins = [sum(row["counts"][:n]) for n in range(len(row["counts"]))]
    entries = [set(row["ids"][b : b + count]) for b, count in zip(begins, row["counts"], strict=True)]
    n = next(n for n, count in enumerate(row["counts"]) if count > 2)
    row["ids"][begins[n] : begins[n] + row["counts"][n]] = sorted(entries[n] - {row["tokens"][n]} | {0, 1, 2})[
        : row["counts"][n]
    ]
    row["logprobs"][begins[n]] = -math.inf


def to_weights(contents):
    for row in contents.rows:
        row["weights"] = [1.0] * len(row["tokens"])


ROWS = {  # what is said of the row, and the change
    "an id far outside the vocabulary": (set_last("ids", HUGE), "outside the vocabulary"),
    "the largest id that fits": (set_last("ids", 2**31 - 1), "outside the vocabulary"),
    "an id just outside the vocabulary": (set_last("ids", 641), "outside the vocabulary"),
    "an id below 0": (lambda c: c.row()["ids"].__setitem__(0, -1), "an id is below 0"),
    "an id twice": (repeat_an_id, "ids are not ascending"),
    "a log-probability above 0": (set_last("logprobs", 50.0), "log-probability is above 0"),
    "a log-probability that is NaN": (set_last("logprobs", math.nan), "log-probability is above 0"),
    "an infinite log-probability": (set_last("logprobs", math.inf), "log-probability is above 0"),
    "masses above 1": (set_all("logprobs", 0.0), "do not sum to 1"),
    "a draw from a tail of 0": (set_all("tail", 0.0), ""),
    "a tail below 0": (set_last("tail", -5.0), "a tail is no probability"),
    "a tail above 1": (set_last("tail", 2.0), "a tail is no probability"),
    "a tail that is NaN": (set_last("tail", math.nan), "a tail is no probability"),
    "gold above 0": (set_last("gold", 0.5), "log-probability is above 0"),
    "gold that is NaN": (set_last("gold", math.nan), "log-probability is above 0"),
    "gold 0 everywhere": (set_all("gold", 0.0), "gold is not what its entry"),
    "a draw of the token that came": (draw_gold, "gold is not what its entry"),
    "a draw in a row without the token that came": (draw_beside_gold, "do not sum to 1|gold is not what"),
    "a count below 0": (set_last("counts", -1), "counts"),
    "a count too large": (set_last("counts", HUGE), "fit"),
    "a token outside the vocabulary": (set_last("tokens", HUGE), "outside the vocabulary"),
    "a token below 0": (set_last("tokens", -7), "a token is below 0"),
    "starts that fall": (set_last("starts", 0), "tokens begin outside the text, or not in order"),
    "a start outside the text": (set_last("starts", HUGE), "tokens begin outside the text, or not in order"),
    "a start before the text": (lambda c: c.row()["starts"].__setitem__(0, -2), "tokens begin outside the text"),
    "columns of different lengths": (lambda c: c.row()["gold"].pop(), "does not fit"),
    "weights in a capture": (to_weights, "weights do not fit"),
}
DOCUMENTS = {
    "nats below 0": (set_field("nats", -5000.0), "cross-entropy"),
    "nats that are NaN": (set_field("nats", math.nan), "cross-entropy"),
    "nats of other golds": (set_field("nats", 5000.0), "cross-entropy"),
    "infinite nats": (set_field("nats", math.inf), "cross-entropy"),
    "bytes below 0": (set_field("bytes", -1), "bytes"),
    "a fingerprint that is none": (set_field("text", "no fingerprint"), "fingerprint"),
}
INDEX = {
    "an index out of order": (lambda c: c.index.reverse(), "not in order"),
    "a document twice in the index": (lambda c: c.index.insert(0, dict(c.index[0])), "not in order"),
    "a part below 0": (set_index("part", -1), "has part -1"),
    "a part that is not there": (set_index("part", 99), "in part 99"),
    "a row group that is not there": (set_index("group", 99), "is said to be in a row"),
    "a row below 0": (set_index("row", -1), "has row -1"),
    "a row that is not there": (set_index("row", 99), "is said to be in a row"),
    "another document's row": (swap_rows_in_the_index, "says another thing"),
    "other tokens": (set_index("tokens", 1), "tokens, the manifest counts"),
    "other bytes": (set_index("bytes", 1), "says another thing"),
    "another text": (set_index("text", "0" * 16), "says another thing"),
    "an empty index": (lambda c: c.index.clear(), "0 documents"),
    "a document less": (lambda c: c.index.pop(), "documents"),
}
MANIFEST = {
    "fewer documents": (set_count("documents", 1), "documents"),
    "other tokens": (set_count("tokens", 1), "tokens"),
    "other entries": (set_count("entries", 1), "entries"),
    "a count that is none": (set_count("documents", "many"), "counts.documents"),
    "a count below 0": (set_count("entries", -1), "counts.entries"),
    "skipped documents that are no names": (set_count("skipped", [1]), "counts.skipped"),
    "another vocabulary": (set_count("vocabulary_size", 2), "outside the vocabulary"),
    "a vocabulary that is none": (set_count("vocabulary_size", "x"), "vocabulary_size"),
    "an unknown stage": (lambda c: c.made.__setitem__("stage", "train"), "stage"),
}
KINDS = {
    **{f"rows: {name}": (*kind, True) for name, kind in ROWS.items()},
    **{f"documents: {name}": (*kind, True) for name, kind in DOCUMENTS.items()},
    **{f"index: {name}": (*kind, False) for name, kind in INDEX.items()},
    **{f"manifest: {name}": (*kind, False) for name, kind in MANIFEST.items()},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, texts, byte_level, sentence_piece):
    """Return a run that has captured its sources; `own` has 641 ids."""
    folder = tmp_path_factory.mktemp("run")
    rows = tiny_run.short(texts, length=41)
    file = tiny_run.write(folder, target=sentence_piece, sources={"own": byte_level}, rows=rows)
    assert fuselm("capture", file, cache=folder / "cache").code == 0
    return folder


@pytest.fixture(scope="module")
def captured(run):
    return next((run / "out" / "capture").glob("own-*"))


def problems_of(folder) -> list[str]:
    """Return what `verify` says, or why it refuses to begin."""
    try:
        return list(map(str, verify_store(folder, progress=tiny_run.QUIET).problems))
    except ValueError as error:
        return [str(error)]


def test_an_unchanged_copy_is_whole_and_remembered_as_sound(captured, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    folder = tamper(captured, tmp_path / "store", lambda contents: None)
    assert problems_of(captured) == problems_of(folder) == []
    again = tamper(captured, tmp_path / "again", lambda contents: None)
    first, second = Store(again), None
    assert first._unchecked
    list(first)
    second = Store(again)
    assert not second._unchecked and take_apart(again).rows == take_apart(captured).rows
    assert Store(again, vocabulary_size=2)._unchecked, "a smaller vocabulary is another question"
    store.part_path(again, 0).touch()
    assert Store(again)._unchecked, "what was changed is checked again"


@pytest.mark.parametrize("kind", KINDS)
def test_an_impossible_store_is_refused_by_verify_and_by_whatever_reads_it(captured, tmp_path, kind):
    change, expected, reindex = KINDS[kind]
    folder = tamper(captured, tmp_path / "store", change, reindex=reindex)
    found = problems_of(folder)
    assert found and re.search(expected, " ".join(found)), found
    with pytest.raises(ValueError) as caught:
        list(Store(folder))
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        Store(folder).check()


@pytest.mark.parametrize("kind", [*KINDS, "other tokens", "cut tokens", "a document twice"])
def test_a_run_refuses_an_impossible_store_in_one_line(run, captured, tmp_path, kind):
    own = {
        "other tokens": (other_tokens, "", True),
        "cut tokens": (cut_tokens, "", True),
        "a document twice": (repeat_a_document, "", True),
    }
    change, _, reindex = (KINDS | own)[kind]
    folder = tamper(captured, tmp_path / "store", change, reindex=reindex)
    outcome = fuselm("align", run / "run.yaml", f"sources.own.store={folder}", f"output={run / 'refused'}")
    assert outcome.code == 2, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("fuselm: ")]
    assert "store" in line or "document" in line
    assert not list((run / "refused").rglob("align/*/manifest.json"))


def test_a_store_with_the_largest_id_known_is_checked_by_the_vocabulary_of_its_model(captured, tmp_path):
    """Check an old manifest without a number of ids by the model that a run names."""

    def change(contents):
        del contents.made["counts"]["vocabulary_size"]
        contents.row()["ids"][-1] = 641

    folder = tamper(captured, tmp_path / "store", change)
    assert problems_of(folder) == []
    with pytest.raises(ValueError, match="an id is outside the vocabulary"):
        list(Store(folder, vocabulary_size=641))
    (problem,) = verify_store(folder, progress=tiny_run.QUIET, vocabulary_size=641).problems
    assert "an id is outside the vocabulary" in str(problem)


FIELDS = [None, [], "text", -1, 0.5, {"a": []}, 10**400]


@pytest.mark.parametrize("name", ["format", *manifest.FIELDS])
def test_a_missing_or_mistyped_field_of_the_manifest_is_one_line_in_every_command(captured, tmp_path, name):
    folder = tamper(captured, tmp_path / "store", lambda contents: None)
    made = json.loads((folder / "manifest.json").read_text())
    mistyped = [made | {name: value} for value in FIELDS if not isinstance(value, type(made[name]))]
    for broken in [{field: value for field, value in made.items() if field != name}, *mistyped]:
        if name == "seconds" and isinstance(broken.get(name), int | float):
            continue  # whichever number it is
        (folder / "manifest.json").write_text(json.dumps(broken))
        for command in ("info", "verify", "head"):
            outcome = fuselm("store", command, folder)
            assert outcome.code == 2 and outcome.err.count("\n") == 1 and str(folder) in outcome.err, outcome.err


MISTYPED = {
    "about.model": [-1, 0.5, True, [], ["a"], {"a": {}}, math.nan],
    "about.revision": [5, []],
    "parameters.draws": [0, -1, 0.5, True, "28", [], {}, math.nan],
    "parameters.top_k": [0, "x", [], math.inf],
    "parameters.threshold": [-1, "x", [], math.nan, True],
    "parameters.mass": [-2, "x", {}, math.nan],
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_manifest_names_the_model_as_text_and_the_policy_in_numbers(captured, tmp_path, name):
    section, field = name.split(".")
    for value in MISTYPED[name]:
        folder = tamper(
            captured, tmp_path / "store", lambda contents, value=value: contents.made[section].update({field: value})
        )
        subset = ["subset", tmp_path / "out", folder, "--policy", "top_k", "--top-k", 3]
        for command in (["info", folder], ["verify", folder], ["head", folder], subset):
            outcome = fuselm("store", *command)
            assert outcome.code == 2 and outcome.err.count("\n") == 1 and name in outcome.err, (value, outcome.err)
            assert str(folder / "manifest.json") in outcome.err


@pytest.mark.parametrize(
    "model", [".", "/", "~nobody-of-this-name/a", "a" * 5000, "\ud800", "\0", "\n[/quote]\x1b[31m"]
)
def test_a_model_name_is_never_opened_as_a_path(captured, tmp_path, model):
    folder = tamper(captured, tmp_path / "store", lambda contents: contents.made["about"].update(model=model))
    for command in ("info", "verify", "head"):
        outcome = fuselm("store", command, folder)
        assert outcome.code == 0 and "\x1b" not in outcome.out + outcome.err, outcome.err


def test_deeply_nested_json_is_refused_in_one_line(captured, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"id": ' + "[" * 100_000 + "\n")
    outcome = fuselm("store", "subset", tmp_path / "out", captured, "--documents", path)
    assert outcome.code == 2 and outcome.err == (
        f"fuselm: {path}: not a run's documents.jsonl (corpus/<key>/documents.jsonl)\n"
    )


FILES = {
    "a path up": {"../part-00000.parquet": "0" * 64},
    "an absolute path": {"/etc/passwd": "0" * 64},
    "a folder's path": {"a/../../b": "0" * 64},
    "no hash": {"part-00000.parquet": 5},
    "no name": {"": "0" * 64},
}


@pytest.mark.parametrize("kind", FILES)
def test_a_manifest_may_name_files_of_its_own_folder_only(captured, tmp_path, kind):
    folder = tamper(captured, tmp_path / "store", lambda contents: None)
    made = json.loads((folder / "manifest.json").read_text()) | {"files": FILES[kind]}
    (folder / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=re.escape(f"{folder}/manifest.json: damaged (")):
        Store(folder)


def test_a_path_that_is_not_a_file_is_named(captured, tmp_path):
    for name in (store.INDEX, "part-00000.parquet"):
        for make in ("folder", "nothing", "a dangling link", "empty", "unreadable link"):
            folder = tamper(captured, tmp_path / "store", lambda contents: None)
            path = folder / name
            path.unlink()
            if make == "folder":
                path.mkdir()
            elif make == "a dangling link":
                path.symlink_to(tmp_path / "nowhere")
            elif make == "unreadable link":
                path.symlink_to("/dev/zero")
            elif make == "empty":
                path.write_bytes(b"")
            for command in ("info", "head"):
                outcome = fuselm("store", command, folder)
                assert outcome.code == 2 and outcome.err.count("\n") == 1 and str(path) in outcome.err, outcome.err


def test_a_few_bytes_that_claim_to_be_many_take_no_memory(captured, tmp_path):
    import resource

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tamper(captured, tmp_path / "store", lambda contents: None)
    path = store.part_path(folder, 0)
    table = pq.read_table(path).slice(0, 1)
    zeros = pa.ListArray.from_arrays(np.array([0, 17_000_000], np.int32), pa.array(np.zeros(17_000_000, np.int32)))
    place = table.schema.get_field_index("ids")
    table = table.set_column(place, store.SCHEMA.field("ids"), zeros.cast(store.SCHEMA.field("ids").type))
    pq.write_table(table, path, compression="zstd")
    del table, zeros
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"column ids.list.element claims \d+ bytes from \d+ on disk"):
        list(Store(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"
