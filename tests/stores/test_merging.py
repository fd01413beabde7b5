"""merging.py: rows are copied bit for bit, and stores that do not belong together are refused."""

import itertools
import json
from dataclasses import replace

import drawn
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuselm.stores import merging, retention, store
from fuselm.stores.retention import Policy
from fuselm.stores.rows import Trace, read_traces
from fuselm.stores.store import Store
from fuselm.stores.verification import verify_store
from fuselm.system import manifest
from fuselm.system.manifest import Recipe, build_once
from fuselm.system.progress import Progress

QUIET = Progress(Console(quiet=True), "")
VOCABULARY = drawn.byte_pairs([(0, 1), (2, 0), (1, 1)])
INPUTS = {"model": "0f", "tokenizer": "1f", "corpus": "2f"}


def trace(document: str, *, top_k: int | None = 5) -> Trace:
    random = np.random.default_rng(sum(map(ord, document)))
    made = drawn.trace_of(VOCABULARY, "ab é" * 7 + document, random, top_k=top_k, document=document)
    return replace(made, text=store.fingerprint_text(document))


def written(folder, documents, *, skipped=(), parameters=None, inputs=None, stage="capture", **options):
    recipe = Recipe(
        stage=stage,
        parameters={"policy": "top_k", "top_k": 5, "batch_tokens": 7} | (parameters or {}),
        inputs=INPUTS | (inputs or {}),
        about={"model": "some/model"},
    )
    traces = [trace(document, **options) for document in documents]
    build_once(folder, recipe, lambda out: {**store.write_parts(out, traces), "skipped": list(skipped)})
    return folder


def rows(folder) -> dict[str, dict]:
    return {row.pop("document"): row for table in Store(folder).read_tables() for row in table.to_pylist()}


def test_shards_become_one_store_whatever_their_order(tmp_path):
    shards = [
        written(tmp_path / "x", ["a", "b"], skipped=["e", "z"]),
        written(tmp_path / "y", ["c", "b"], parameters={"batch_tokens": 11}),
        written(tmp_path / "z", ["d", "e"], inputs={"corpus": "3f"}),
    ]
    expected = {name: row for shard in shards for name, row in rows(shard).items()}
    files, keys = set(), set()
    for n, order in enumerate(itertools.permutations(shards)):
        out = tmp_path / f"out{n}"
        assert merging.merge_stores(order, out, progress=QUIET)
        made = manifest.read(out)
        files.add(json.dumps(made["files"]))
        keys.add(made["key"])
    assert len(files) == len(keys) == 1
    assert rows(out) == expected and Store(out).documents == ["a", "b", "c", "d", "e"]
    assert verify_store(out, progress=QUIET).problems == ()
    assert made["counts"]["repeated"] == 1 and made["counts"]["skipped"] == ["z"]
    assert made["inputs"]["model"] == "0f" and "batch_tokens" not in made["parameters"]
    assert not merging.merge_stores(shards, out, progress=QUIET)


def test_one_document_with_other_rows_is_refused_and_leaves_no_store(tmp_path):
    one, other = written(tmp_path / "x", ["a"]), written(tmp_path / "y", ["a", "b"], top_k=4)
    with pytest.raises(ValueError, match=r"document a: .*x and .*y have different rows of it; drop it from one"):
        merging.merge_stores([one, other], tmp_path / "out", progress=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": {"model": "ff"}}, r"y: differs from .*x in model \(ff and 0f\); merge captures by one model"),
        ({"inputs": {"tokenizer": "ff"}}, r"y: differs from .*x in tokenizer \(ff and 1f\)"),
        ({"parameters": {"top_k": 3}}, r"y: differs from .*x in top_k \(3 and 5\)"),
        ({"parameters": {"policy": "nucleus", "mass": 0.5}}, r"in mass \(0.5 and None\), policy \(nucleus and top_k\)"),
        ({"stage": "align"}, r"y: of stage align; merge captures, and let a run align and fuse them"),
    ],
)
def test_stores_of_other_kinds_are_refused(tmp_path, options, said):
    one, other = written(tmp_path / "x", ["a"]), written(tmp_path / "y", ["b"], **options)
    with pytest.raises(ValueError, match=said):
        merging.merge_stores([one, other], tmp_path / "out", progress=QUIET)


def test_nothing_is_overwritten(tmp_path):
    one, other = written(tmp_path / "x", ["a"]), written(tmp_path / "y", ["b"])
    with pytest.raises(ValueError, match="y: there already, and made of other inputs; name another folder"):
        merging.merge_stores([one, other], other, progress=QUIET)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine: there already, and no store; name another folder"):
        merging.merge_stores([one, other], tmp_path / "mine", progress=QUIET)


def test_an_interrupted_merge_starts_again(tmp_path):
    shards = [written(tmp_path / "x", ["a", "b"]), written(tmp_path / "y", ["c"])]
    merging.merge_stores(shards, tmp_path / "whole", progress=QUIET)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for number in (0, 5):
        store.write_part(partial, number, [trace("f")])
    merging.merge_stores(shards, tmp_path / "out", progress=QUIET)
    assert manifest.read(tmp_path / "out")["files"] == manifest.read(tmp_path / "whole")["files"]


def test_copied_rows_are_grouped_as_they_are_written(tmp_path, monkeypatch):
    """Join small tables to row groups, and row groups to parts."""
    monkeypatch.setattr(store, "GROUP_TOKENS", 31)
    monkeypatch.setattr(store, "PART_TOKENS", 83)
    names = [f"{n:02d}" for n in range(17)]
    one = written(tmp_path / "x", names)
    tables = [table.slice(n, 1) for table in Store(one).read_tables() for n in range(len(table))]
    out = tmp_path / "out"
    out.mkdir()
    assert merging.copy_rows(out, tables) == store.write_index(one)
    parts = [pq.ParquetFile(path) for path in sorted(out.glob("part-*.parquet"))]
    groups = [[merging.count_tokens(file.read_row_group(n)) for n in range(file.num_row_groups)] for file in parts]
    assert len(parts) > 1 and min(sum(part) for part in groups[:-1]) >= 83
    assert min(itertools.chain.from_iterable(groups[:-1])) >= 31
    assert pa.concat_tables(tables).equals(pa.concat_tables([file.read() for file in parts]))


def test_a_subset_has_the_chosen_documents(tmp_path):
    whole = written(tmp_path / "x", ["a", "b", "c"], skipped=["y", "z"])
    merging.write_subset(whole, tmp_path / "out", documents={"c", "a", "z"}, policy=None, progress=QUIET)
    expected = rows(whole)
    assert rows(tmp_path / "out") == {name: expected[name] for name in ("a", "c")}
    made = manifest.read(tmp_path / "out")
    assert made["counts"]["skipped"] == ["z"] and made["inputs"]["model"] == "0f"
    assert verify_store(tmp_path / "out", progress=QUIET).problems == ()
    with pytest.raises(ValueError, match=r"x: has no document q \(1 such\); leave those out"):
        merging.write_subset(whole, tmp_path / "no", documents={"a", "q"}, policy=None, progress=QUIET)


@given(st.sampled_from(["top_k", "nucleus", "threshold"]), st.integers(1, 7), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_cut_keeps_what_the_policy_would_and_moves_nothing(name, top_k, number, seed):
    made = drawn.trace_of(VOCABULARY, "abba é" * 3, np.random.default_rng(seed))
    table = store.build_table([made, trace("empty")]).slice(0, 1)
    policy = Policy(policy=name, top_k=top_k, mass=number, threshold=number)
    (before,), after = read_traces(table), merging.cut_rows(table, policy, where="x")
    (back,) = read_traces(after)
    wanted = retention.narrow_rows(policy, before.distributions)
    assert np.array_equal(np.sort(back.distributions.ids), np.sort(wanted.ids))
    assert np.array_equal(back.distributions.offsets, wanted.offsets)
    np.testing.assert_allclose(np.sqrt(back.distributions.tail), np.sqrt(wanted.tail), atol=1 / 256)
    assert after.schema.equals(store.SCHEMA)
    entries = [dict(zip(r["ids"], r["logprobs"], strict=True)) for r in by_row(after)]
    for row, full in zip(
        entries, (dict(zip(r["ids"], r["logprobs"], strict=True)) for r in by_row(table)), strict=True
    ):
        assert row.items() <= full.items()
    again = merging.cut_rows(after, policy, where="x") if name == "top_k" else after
    assert again.equals(after)


def test_a_cut_of_sampled_rows_keeps_the_head_alone():
    made = drawn.trace_of(VOCABULARY, "abba é" * 3, np.random.default_rng(0))
    d = made.distributions
    probs = np.exp(d.logprobs.astype(np.float64))
    below = probs < 0.2
    below[d.offsets[:-1]] = False  # the largest
    below[(d.ids == made.tokens[d.rows])] = False  # gold
    tail = d.tail + np.bincount(d.rows[below], probs[below], len(d))
    kept = replace(d, logprobs=np.where(below, -np.inf, d.logprobs).astype(np.float32), tail=tail.astype(np.float32))
    table = store.build_table([replace(made, distributions=kept)])
    policy = Policy(policy="threshold", threshold=0.25)
    (back,) = read_traces(merging.cut_rows(table, policy, draws=5, where="x"))
    found = [dict(zip(*(x.tolist() for x in back.distributions.row(i)), strict=True)) for i in range(len(d))]
    (head,) = read_traces(table, draws=False)
    for i, row in enumerate(found):
        ids, logprobs = head.distributions.row(i)
        assert row.keys() == {int(t) for n, (t, p) in enumerate(zip(ids, logprobs, strict=True)) if not n or p > -1.386}
    with pytest.raises(ValueError, match=r"^x: document .* fewer than the policy would keep"):
        merging.cut_rows(table, Policy(policy="threshold", threshold=0.1), draws=5, where="x")


def by_row(table: pa.Table) -> list[dict]:
    (row,) = table.to_pylist()
    edges = np.cumsum([0, *row["counts"]])
    return [{name: row[name][a:b] for name in ("ids", "logprobs")} for a, b in itertools.pairwise(edges)]


def test_a_subset_by_policy_says_so(tmp_path):
    whole = written(tmp_path / "x", ["a", "b"])
    policy = merging.complete_policy("nucleus", {"mass": 0.3, "top_k": None, "threshold": None}, {"top_k": 5})
    assert policy == {"policy": "nucleus", "mass": 0.3, "top_k": 5}
    merging.write_subset(whole, tmp_path / "out", documents=None, policy=policy, progress=QUIET)
    assert manifest.read(tmp_path / "out")["parameters"] == {**policy, "batch_tokens": 7}
    assert verify_store(tmp_path / "out", progress=QUIET).problems == ()
    entries = [manifest.read(folder)["counts"]["entries"] for folder in (tmp_path / "out", whole)]
    assert (
        entries[0]
        < entries[1]
        == 5 * sum(pc.list_value_length(t["tokens"]).to_numpy().sum() for t in Store(whole).read_tables())
    )


def test_a_policy_that_keeps_more_than_the_store_has_is_refused(tmp_path):
    whole = written(tmp_path / "x", ["a", "b"])
    for policy, said in [
        ({"policy": "top_k", "top_k": 6}, r"x: document a: top_k: row 0 has 5 entries and a tail of .*, fewer than"),
        ({"policy": "sampled", "draws": 5}, "x: document a: sampled: cannot be drawn from kept"),
    ]:
        with pytest.raises(ValueError, match=said):
            merging.write_subset(whole, tmp_path / "out", documents=None, policy=policy, progress=QUIET)


def test_a_number_of_another_policy_is_refused():
    with pytest.raises(ValueError, match=r"^--mass: an option of nucleus, but --policy is top_k; drop one$"):
        merging.complete_policy("top_k", {"mass": 0.5}, {})
    with pytest.raises(ValueError, match=r"^--policy best: unknown; needs one of threshold, top_k, nucleus, sampled$"):
        merging.complete_policy("best", {}, {})
