"""Test order.py: the order of documents is that of plain Python, in arrays, whatever there is to shuffle."""

import itertools

import numpy as np
import reference_order as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.documents.passages import pack_documents
from fuselm.training import order
from fuselm.training.order import Order, order_documents, shuffle_passes


@settings(deadline=None)
@given(st.lists(st.integers(1, 97), max_size=67), st.integers(1, 3), st.sampled_from([1, 2, 5]), st.integers(0, 9))
def test_every_pass_reads_every_document_once(lengths, passes, batch, seed):
    order = order_documents(lengths, passes=passes, batch=batch, seed=seed).tolist()
    assert sorted(order) == sorted(list(range(len(lengths))) * passes)
    assert order == reference.order_documents(lengths, passes=passes, batch=batch, seed=seed)


@settings(deadline=None)
@given(st.lists(st.integers(1, 97), min_size=1, max_size=16), st.integers(0, 9))
def test_a_pass_that_fits_a_window_is_a_permutation(lengths, seed):
    order = order_documents(lengths, passes=1, batch=2, seed=seed).tolist()
    assert sorted(order) == list(range(len(lengths)))


def test_a_batch_has_documents_of_like_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 997, size=64).tolist()
    order = order_documents(lengths, passes=1, batch=4, seed=0).tolist()

    def padding(indices: list[int]) -> int:
        batches = [[lengths[i] for i in indices[k : k + 4]] for k in range(0, 64, 4)]
        return sum(max(b) * len(b) - sum(b) for b in batches)

    assert padding(order) < padding(list(range(64))) / 3


def test_another_seed_reads_in_another_order():
    orders = [order_documents([5] * 31, passes=1, batch=2, seed=seed).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 97), max_size=67), st.integers(1, 211), st.integers(0, 9))
def test_packs_hold_the_stream_in_order_and_no_more_tokens_than_they_may(lengths, tokens, seed):
    stream = shuffle_passes(lengths, passes=2, seed=seed).tolist()
    order = Order(lengths, passes=2, batch_documents=None, pack_tokens=tokens, seed=seed)
    result = [order.find_batch(n).tolist() for n in range(len(order))]
    assert result == pack_documents(lengths, stream, tokens)
    assert [order.count_tokens(n) for n in (0, 1, len(order))] == [
        sum(lengths[i] for pack in result[:n] for i in pack) for n in (0, 1, len(order))
    ]
    assert [i for pack in result for i in pack] == stream
    totals = [sum(lengths[i] for i in pack) for pack in result]
    assert all(total <= tokens or len(pack) == 1 for total, pack in zip(totals, result, strict=True))
    for total, (_, after) in zip(totals, itertools.pairwise(result), strict=False):
        assert total + lengths[after[0]] > tokens  # as many as fit


def test_a_large_corpus_is_read_some_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr(order, "BLOCK_TOKENS", 31)
    monkeypatch.setattr(order, "MIXED_BLOCKS", 3)
    lengths = np.random.default_rng(0).integers(0, 13, 211).tolist()
    blocks = pack_documents(lengths, range(len(lengths)), 31)
    block_of = {i: n for n, block in enumerate(blocks) for i in block}
    stream = shuffle_passes(lengths, passes=2, seed=0).tolist()
    assert stream == reference.shuffle_passes(lengths, passes=2, seed=0, tokens=31, mixed=3)
    first, second = stream[: len(lengths)], stream[len(lengths) :]
    assert sorted(first) == sorted(second) == list(range(len(lengths))) and first != second
    for stream in (first, second):
        windows = []
        for i in stream:  # a window is over once its blocks are
            if not windows or sum(len(blocks[n]) for n in {block_of[k] for k in windows[-1]}) == len(windows[-1]):
                windows.append([])
            windows[-1].append(i)
        sizes = [len({block_of[k] for k in window}) for window in windows]
        assert max(sizes) <= 3 and len(sizes) > len(blocks) / 4
        assert any(abs(block_of[a] - block_of[b]) > 3 for a, b in itertools.pairwise(stream[:31])), "from all over"


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 97), max_size=67), st.integers(1, 3), st.sampled_from([1, 2, 5, None]), st.integers(0, 99)
)
def test_tokens_of_the_first_batches_are_counted_without_reading_them(lengths, passes, batch, first):
    order = Order(lengths, passes=passes, batch_documents=batch, pack_tokens=None, seed=0)
    read = [i for n in range(min(first, len(order))) for i in order.find_batch(n).tolist()]
    assert order.count_tokens(first) == sum(lengths[i] for i in read)


def test_more_documents_than_are_shuffled_together_are_in_the_order_of_plain_python():
    lengths = np.random.default_rng(0).integers(0, 997, 3001).tolist()
    assert sum(lengths) > 2 * order.MIXED_BLOCKS * order.BLOCK_TOKENS
    expected = reference.order_documents(lengths, passes=2, batch=4, seed=5)
    assert order_documents(lengths, passes=2, batch=4, seed=5).tolist() == expected
