"""Compare spellings and their trie with counts over the whole vocabulary."""

import collections

import drawn
import numpy as np
import pytest

from fuselm.alignment.spelling import find_child, spell_vocabulary
from fuselm.models.bpe import NOTHING

PAIRS = [
    (drawn.byte_pairs([(0, 1), (1, 0), (5, 6), (7, 0)]), drawn.byte_pairs([(1, 0), (0, 0)])),
    (drawn.byte_pairs([]), drawn.byte_pairs([(0, 1)])),
    (drawn.word_pieces(["a", "##a", "b", "##b", "ab"]), drawn.byte_pairs([(0, 1)])),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_id_is_spelled_as_the_tokenizer_continues_with_it(source, target):
    spelling = spell_vocabulary(source, target)
    for id, begin in enumerate(spelling.begins):
        string = source.token_bytes[id]
        spelled = tuple(spelling.steps["token"][begin["at"] : begin["stop"]].tolist())
        assert spelled == (() if string is None else target.encode_bytes([string])[0])
        assert not spelled or begin["token"] == spelled[0]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_nodes_count_the_ids_that_begin_with_them(source, target):
    spelling = spell_vocabulary(source, target)
    spelled = [s for s in target.encode_bytes([b for b in source.token_bytes if b]) if s]
    prefixes = {s[:n] for s in spelled for n in range(len(s) + 1) if NOTHING not in s[:n]}
    begins = collections.Counter(s[0] for s in spelled)
    assert {t: n for t, n in enumerate(spelling.ids_begun) if n} == {t: n for t, n in begins.items() if t != NOTHING}
    seen = set()
    for prefix in prefixes:
        node = 0
        for token in prefix:
            node = find_child(spelling, node, token)
        seen.add(node)
        assert spelling.ids_below[node] == sum(s[: len(prefix)] == prefix for s in spelled)
        assert spelling.ids_beyond[node] == sum(s[: len(prefix)] == prefix and len(s) > len(prefix) for s in spelled)
        for token in range(target.size):
            assert (find_child(spelling, node, token) >= 0) == ((*prefix, token) in prefixes)
    assert seen == set(range(len(spelling.ids_below)))
    assert np.array_equal(np.diff(spelling.first_child).sum(), len(spelling.ids_below) - 1)
