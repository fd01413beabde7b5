"""Check separation.py against tokenizing both tokens together."""

import enumeration
import numpy as np
import pytest

from fuselm.alignment.plain_spelling import spell_words
from fuselm.alignment.separation import find_separate
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model


def assert_as_spelled(vocabulary, lefts, rights):
    found = find_separate(vocabulary.merges, *vocabulary.packed_bytes, np.array(lefts), np.array(rights))
    for left, row in zip(lefts, found, strict=True):
        together = [(vocabulary.token_bytes[left] or b"") + (vocabulary.token_bytes[r] or b"") for r in rights]
        spelled = spell_words(vocabulary.merges, together)
        assert row.tolist() == [ids == (left, r) for ids, r in zip(spelled, rights, strict=True)]
    return found


def test_letters_that_merge_are_not_separate():
    vocabulary = enumeration.vocabulary([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "a")])
    ids = [i for i, b in enumerate(vocabulary.token_bytes) if b]
    found = assert_as_spelled(vocabulary, ids, ids)
    at = {vocabulary.token_bytes[i]: n for n, i in enumerate(ids)}
    assert not found[at[b"a"], at[b"b"]] and found[at[b"b"], at[b"a"]] and not found[at[b"a"], at[b"bc"]]
    assert not found[at[b"a"], at[b"aa"]] and found[at[b"aa"], at[b"a"]] and found[at[b"aa"], at[b"aa"]]


@pytest.mark.parametrize("family", ["byte_level", "sentence_piece"])
def test_real_tokens_are_separate_if_they_are_spelled_so(family, request):
    vocabulary = load_vocabulary(locate_model(str(request.getfixturevalue(family))))
    if vocabulary.merges is None:
        pytest.skip("not a tokenizer with merges")
    ids = [i for i, b in enumerate(vocabulary.token_bytes) if b]
    random = np.random.default_rng(0)
    found = assert_as_spelled(vocabulary, random.choice(ids, 101).tolist(), random.choice(ids, 97).tolist())
    assert 0 < found.mean() < 1
