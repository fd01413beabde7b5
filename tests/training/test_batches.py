"""Test batches.py: a training step reads what is in a store, and in which order it reads documents."""

import itertools
import random
from dataclasses import replace

import drawn
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuselm.documents.corpus import Document
from fuselm.documents.passages import pack_documents
from fuselm.stores import parts
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, write_parts
from fuselm.system.manifest import Recipe, build_once
from fuselm.training import batches
from fuselm.training.batches import Batches, Collator, shuffle_passes

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
    dataset = Batches(other, VOCABULARY, fused, passes=1, batch_documents=2, pack_tokens=None, seed=0, processes=1)
    with pytest.raises(ValueError, match="store: document d1: other tokens than the target's; fuse again"):
        dataset[0]


@given(st.lists(st.integers(0, 97), max_size=67), st.integers(1, 3), st.integers(0, 9))
def test_a_small_corpus_is_shuffled_as_one(lengths, passes, seed):
    expected = [
        i for n in range(passes) for i in random.Random(f"{seed} {n}").sample(range(len(lengths)), len(lengths))
    ]
    assert shuffle_passes(lengths, passes=passes, seed=seed) == expected


def test_a_large_corpus_is_read_some_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr(batches, "BLOCK_TOKENS", 31)
    monkeypatch.setattr(batches, "MIXED_BLOCKS", 3)
    lengths = np.random.default_rng(0).integers(0, 13, 211).tolist()
    blocks = pack_documents(lengths, range(len(lengths)), 31)
    block_of = {i: n for n, block in enumerate(blocks) for i in block}
    stream = shuffle_passes(lengths, passes=2, seed=0)
    first, second = stream[: len(lengths)], stream[len(lengths) :]
    assert sorted(first) == sorted(second) == list(range(len(lengths))) and first != second
    for order in (first, second):
        windows = []
        for i in order:  # a window is over once its blocks are
            if not windows or sum(len(blocks[n]) for n in {block_of[k] for k in windows[-1]}) == len(windows[-1]):
                windows.append([])
            windows[-1].append(i)
        sizes = [len({block_of[k] for k in window}) for window in windows]
        assert max(sizes) <= 3 and len(sizes) > len(blocks) / 4
        assert any(abs(block_of[a] - block_of[b]) > 3 for a, b in itertools.pairwise(order[:31])), "from all over"


@pytest.mark.parametrize("keep_tokens", [0, 7, 1000])
def test_row_groups_that_are_kept_are_not_read_again(fused, monkeypatch, keep_tokens):
    found, read = Store(fused.folder, keep_tokens=keep_tokens), []
    whole = Store._read_checked
    monkeypatch.setattr(Store, "_read_checked", lambda self, *which: read.append(which) or whole(self, *which))
    for _ in range(2):
        for document in DOCUMENTS:
            found.read_for_training(document.id)
    held = sum(rows.tokens for rows in found._kept.values())
    groups = len(set(read))
    assert groups == 3
    assert held <= keep_tokens or len(found._kept) == 1
    assert len(read) == groups if keep_tokens == 1000 else len(read) == 2 * groups
