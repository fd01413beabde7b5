"""Compare mined.py with the golden data and the loops in reference.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from fuselm.alignment.mined import MOST_STEPS, pair_positions

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
tokens = st.lists(st.text("abé日", max_size=3), max_size=7)


def target_to_source(path: np.ndarray, targets: int) -> list[list[int]]:
    return [path[path[:, 1] == i, 0].tolist() for i in range(targets)]


def test_pairs_of_positions_equal_the_golden_ones():
    cases = json.loads((GOLDEN / "dtw_alignment.json").read_bytes())["cases"]
    for case in cases:
        source, target = ([reference.without_marks(t) for t in case[f"{side}_tokens"]] for side in ("source", "target"))
        path = pair_positions(source, target)
        assert target_to_source(path, len(target)) == case["target_to_source"], case["text"]
        assert sum(reference.levenshtein(source[i], target[j]) for i, j in path) == case["dtw_cost"]
    assert len(cases) == 57


@given(tokens, tokens, st.sampled_from([1, 2, 7, 13, MOST_STEPS]))
def test_pairs_of_positions_equal_the_reference(source, target, most_steps):
    """They do so even if not all of the table is held."""
    path = pair_positions(source, target, most_steps=most_steps)
    assert target_to_source(path, len(target)) == reference.dtw_pairs(source, target)


@pytest.mark.parametrize("most_steps", [1, 1009, 7919, 101 * 97])
def test_pairs_of_positions_are_the_same_in_less_memory(most_steps):
    random = np.random.default_rng(0)
    source, target = (["abab"[: random.integers(5)] for _ in range(size)] for size in (101, 97))
    np.testing.assert_array_equal(pair_positions(source, target, most_steps=most_steps), pair_positions(source, target))


def test_distances_above_255_are_not_confused():
    """A byte can hold neither 300 nor 256."""
    source, target = ["a" * 300, "a"], ["b" * 300, "b" * 256, "a"]
    assert target_to_source(pair_positions(source, target), 3) == reference.dtw_pairs(source, target)
