"""Check that tables and arrays grow without losing anything, and that rows do not depend on what is remembered."""

import drawn
import numpy as np

from fuselm.alignment import branch_splits
from fuselm.alignment.aligner import Aligner
from fuselm.alignment.key_tables import OWN_PAGES, GrowingArray, KeyTable
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model


def test_arrays_grow_and_what_was_given_out_stays():
    array, whole = GrowingArray(np.int32), np.arange(3 * OWN_PAGES // 4, dtype=np.int32)
    given = []
    for begin in range(0, len(whole), 9973):
        array.append(whole[begin : begin + 9973])
        given.append(array.items)
    assert array.nbytes == whole.nbytes > 2 * OWN_PAGES
    assert all((items == whole[: len(items)]).all() for items in given)


def test_keys_keep_their_numbers_as_the_table_grows():
    table, keys = KeyTable(), np.random.default_rng(0).permutation(70001).astype(np.int64)
    for begin in range(0, len(keys), 7919):
        table.add(keys[begin : begin + 7919])
    assert table.find(keys).tolist() == list(range(len(keys))) and table.find(np.array([70001])).tolist() == [-1]


def test_rows_do_not_depend_on_what_is_remembered(byte_level, sentence_piece, texts, monkeypatch):
    source, target = (load_vocabulary(locate_model(str(folder))) for folder in (byte_level, sentence_piece))
    chosen = [row["text"][:200] for row in texts[:4]]

    def align() -> list:
        aligner = Aligner(source, target, method="branches", texts=chosen)
        traces = [drawn.trace_of(source, text, np.random.default_rng(0), top_k=5) for text in chosen]
        return [aligner.align(*pair).distributions for pair in zip(traces, chosen, strict=True)]

    remembered = align()
    monkeypatch.setattr(branch_splits, "MOST_BYTES", 0)
    for before, after in zip(remembered, align(), strict=True):
        for name in ("offsets", "ids", "logprobs", "tail"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
