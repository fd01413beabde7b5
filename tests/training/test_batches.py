"""Test batches.py: a training step reads what is in a store, and in which order it reads documents."""

from dataclasses import replace

import drawn
import numpy as np
import pytest
import torch

from fuselm.documents.corpus import Document
from fuselm.stores import parts
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, write_parts
from fuselm.system.manifest import Recipe, build_once
from fuselm.training.batches import Batches, Collator

VOCABULARY = drawn.byte_pairs([(0, 1), (2, 0)])
TEXTS = ["abba", "", "a bé b", " ", "ba" * 7, "é"]
DOCUMENTS = [Document(id=f"d{n}", origin=f"d{n}", domain="x", text=text, split="train") for n, text in enumerate(TEXTS)]


def ragged(text: str, chance: np.random.Generator) -> Distributions:
    """Return rows of a text's tokens with 0 to 4 entries."""
    ids = VOCABULARY.segment(text).ids
    counts = chance.integers(0, 5, len(ids))
    masses = [chance.dirichlet(np.ones(count + 1)) for count in counts]
    return Distributions(
        offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
        ids=np.concatenate([np.zeros(0), *(chance.permutation(7)[:count] for count in counts)]).astype(np.int32),
        logprobs=np.log(np.concatenate([np.ones(0), *(m[1:] for m in masses)])).astype(np.float32),
        gold=np.zeros(len(ids), np.float32),
        tail=np.array([m[0] for m in masses], np.float32),
    )


@pytest.fixture
def fused(tmp_path, monkeypatch) -> Store:
    """Write a store with several row groups."""
    monkeypatch.setattr(parts, "GROUP_TOKENS", 5)
    chance = np.random.default_rng(0)
    traces = [drawn.trace(VOCABULARY.segment(d.text), ragged(d.text, chance), document=d.id) for d in DOCUMENTS]
    build_once(tmp_path / "store", Recipe(stage="fuse"), lambda partial: write_parts(partial, traces))
    return Store(tmp_path / "store")


def made(fused: Store, **options) -> Batches:
    options = {"passes": 2, "batch_documents": 4, "pack_tokens": None, "seed": 0, "processes": 1} | options
    return Batches(DOCUMENTS, VOCABULARY, fused, **options)


@pytest.mark.parametrize("options", [{}, {"batch_documents": 1}, {"batch_documents": None, "pack_tokens": 11}])
def test_a_batch_has_the_rows_of_its_documents(fused, options):
    """Compare with `Store.read` by id; columns without an entry have 0 and -inf."""
    traces = {tuple(trace.tokens.tolist()): trace for trace in fused}
    assert len(traces) == len(DOCUMENTS)
    dataset, collate = made(fused, **options), Collator(3, packed="pack_tokens" in options)
    seen = []
    for items in map(dataset.__getitem__, range(len(dataset))):
        batch = collate([items])
        chosen = [traces[tuple(item["tokens"].tolist())] for item in items]
        seen += [trace.document for trace in chosen]
        assert batch["labels"][batch["labels"] != -100].tolist() == [t for trace in chosen for t in trace.tokens]
        rows = [row for trace in chosen for row in map(trace.distributions.row, range(len(trace.tokens)))]
        assert len(batch["fused_ids"]) == len(batch["fused_logprobs"]) == len(batch["fused_tail"]) == len(rows)
        assert batch["fused_ids"].shape[1] == max([1, *(len(ids) for ids, _ in rows)])
        for (ids, logprobs), got_ids, got_logprobs in zip(
            rows, batch["fused_ids"], batch["fused_logprobs"], strict=True
        ):
            order, padding = np.argsort(ids), len(got_ids) - len(ids)
            assert got_ids.tolist() == [*ids[order].tolist(), *[0] * padding]
            assert got_logprobs.tolist() == [*logprobs[order].tolist(), *[-np.inf] * padding]
        assert batch["fused_tail"].tolist() == [x for trace in chosen for x in trace.distributions.tail.tolist()]
        assert batch["fused_ids"].dtype == torch.int64 and batch["fused_logprobs"].dtype == torch.float32
    assert sorted(seen) == sorted(2 * [document.id for document in DOCUMENTS])


def test_other_tokens_than_the_targets_are_refused(fused):
    other = [*DOCUMENTS[:1], *(replace(DOCUMENTS[1], text=text) for text in ["abab"])]
    options = {"passes": 1, "batch_documents": 2, "pack_tokens": None, "seed": 0, "processes": 1}
    with pytest.raises(ValueError, match="store: document d1: other tokens than the target's; fuse again"):
        Batches(other, VOCABULARY, fused, **options)
    with pytest.raises(ValueError, match="store: document d0: other tokens than the target's; fuse again"):
        Batches(DOCUMENTS, drawn.byte_pairs([(1, 1)]), fused, **options)


def test_tokens_are_read_from_the_store_and_not_made_again(fused, monkeypatch):
    dataset, made_again = made(fused), []
    monkeypatch.setattr(type(VOCABULARY), "segment", lambda _, text: made_again.append(text))
    monkeypatch.setattr(type(VOCABULARY), "tokenize", lambda _, texts: made_again.append(texts))
    assert sum(len(item["tokens"]) for n in range(len(dataset)) for item in dataset[n]) == 2 * dataset.tokens_per_pass
    assert not made_again


@pytest.mark.parametrize("batches_of_step", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_a_step_reads_the_same_documents_whatever_the_number_of_processes(fused, batches_of_step, processes):
    options = {"batch_documents": 1, "batches_of_step": batches_of_step}
    alone, dataset = made(fused, **options), made(fused, processes=processes, **options)
    assert dataset.count_steps() == alone.count_steps() == -(-2 * len(DOCUMENTS) // batches_of_step)
    assert len(dataset) % processes == 0 and -(-len(dataset) // processes) <= dataset.count_steps() * batches_of_step
    for step in range(alone.count_steps()):
        found = [
            [i for n in range(of.count_slots(step), of.count_slots(step + 1)) for i in of.list_documents(n)]
            for of in (alone, dataset)
        ]
        assert found[0] == found[1] and len(found[0]) >= 1


@pytest.mark.parametrize("keep_tokens", [0, 7, 1000])
def test_row_groups_that_are_kept_are_not_read_again(fused, monkeypatch, keep_tokens):
    found, read = Store(fused.folder, keep_tokens=keep_tokens), []
    whole = Store._read_checked
    monkeypatch.setattr(Store, "_read_checked", lambda self, *which: read.append(which) or whole(self, *which))
    for _ in range(2):
        for document in DOCUMENTS:
            found.read_for_training(document.id)
    held = found._kept.tokens
    groups = len(set(read))
    assert groups == 3
    assert held <= keep_tokens or len(found._kept) == 1
    assert len(read) == groups if keep_tokens == 1000 else len(read) == 2 * groups


def test_rows_are_read_after_a_store_forgot_the_names_of_its_documents(fused):
    fused.forget_names()
    assert len(fused) == len(DOCUMENTS)  # it is not known to be sound yet
    dataset = made(fused)
    expected = [item for n in range(len(dataset)) for item in dataset[n]]
    fused.forget_names()
    assert DOCUMENTS[0].id not in fused
    again = [item for n in range(len(dataset)) for item in dataset[n]]
    for one, other in zip(expected, again, strict=True):
        assert np.array_equal(one["tokens"], other["tokens"])
        assert np.array_equal(one["fused"].logprobs, other["fused"].logprobs)
