"""Check what words may become, and how splits that begin alike are put together."""

import itertools

import enumeration
import numpy as np
import pytest

from fuselm.alignment import completions
from fuselm.alignment.branch_tails import _find_joined_bytes
from fuselm.alignment.completions import Completions
from fuselm.alignment.split_groups import group_splits

LETTERS, WORDS = enumeration.vocabulary([]), enumeration.vocabulary([("a", "b"), ("ab", "c"), ("b", "c")])

JOINED = _find_joined_bytes(WORDS)


def complete(before: bytes, token: bytes, texts: list[str]) -> dict[bytes, float]:
    """Return what a letter may become a token with, behind other letters."""
    found = Completions(LETTERS, WORDS, JOINED, [LETTERS.segment(text).ids for text in texts])
    data = np.frombuffer(before, np.uint8)
    group, _, _ = completions.find_group(found.table, LETTERS.id_by_bytes[token], data, len(data))
    if group < 0:
        return {}
    items = range(found.first[group], found.first[group + 1])
    return {found.packed[found.edges[e] : found.edges[e + 1]].tobytes(): found.weights[e] for e in items}


def test_a_letter_may_become_each_word_that_it_begins():
    assert set(complete(b"", b"a", [])) == {b"b", b"bc"}
    assert set(complete(b"", b"b", [])) == {b"c"} and complete(b"", b"c", []) == {}


def test_the_longest_beginning_of_a_word_counts():
    assert set(complete(b"a", b"b", [])) == {b"c"}
    found = Completions(LETTERS, WORDS, JOINED, [])
    b = LETTERS.id_by_bytes[b"b"]
    group, length, shorter = completions.find_group(found.table, b, np.frombuffer(b"cca", np.uint8), 3)
    assert length == 1 and group != shorter >= 0
    assert completions.find_group(found.table, b, np.frombuffer(b"cc", np.uint8), 2) == (shorter, 0, -1)


def test_words_weigh_what_texts_have_of_them_and_share_what_is_left_by_rank():
    without, often = complete(b"", b"a", []), complete(b"", b"a", ["abc" * 100])
    assert without[b"b"] > without[b"bc"] > 0
    assert often[b"bc"] > 90 and often[b"b"] < 20


def test_texts_say_how_often_words_that_go_on_become_a_token():
    always = Completions(LETTERS, WORDS, JOINED, [LETTERS.segment("abc" * 200).ids]).shares
    never = Completions(LETTERS, WORDS, JOINED, [LETTERS.segment("bab" * 200 + "b").ids]).shares
    assert (always > 0.6).all() and never[1] < 0.9


@pytest.mark.parametrize(
    ("before", "own", "expected"),
    [
        (b"a", b"b", False),
        (b"", "é".encode(), False),
        (b"", b"\xc3", True),
        (b"\xe4\xbd", b"\xa0", False),
        (b"\xe4", b"\xbd", True),
        (b"", b"\xa0", False),
        (b"\xf0\x9f", b"\x98", True),
    ],
)
def test_a_token_may_end_within_a_character(before, own, expected):
    arrays = (np.frombuffer(data, np.uint8) for data in (before, own))
    assert bool(completions._ends_within_character(*arrays)) is expected


def test_splits_that_begin_alike_are_beside_each_other_and_equal_ones_are_one():
    lists = [[[5], [7, 1], [5], [7, 2], []], [[3, 4], [3, 4]]]
    flat = [tokens for of in lists for tokens in of]
    nothing = np.zeros(len(flat), np.int64)
    first, weights, token_first, tokens, _, _, alike, sums = group_splits(
        np.array([0, 5, 7]),
        np.array([0.1, 0.2, 0.3, 0.25, 0.15, 0.5, 0.5]),
        np.append(0, np.cumsum([len(t) for t in flat])),
        np.array([t for of in flat for t in of], np.int32),
        nothing,
        nothing,
    )
    found = [tuple(tokens[a:b].tolist()) for a, b in itertools.pairwise(token_first)]
    assert found == [(), (5,), (7, 1), (7, 2), (3, 4)] and first.tolist() == [0, 4, 5]
    assert weights == pytest.approx([0.15, 0.4, 0.2, 0.25, 1.0])
    assert alike.tolist() == [1, 1, 2, 0, 1] and sums == pytest.approx([0.15, 0.4, 0.45, 0, 1.0])
