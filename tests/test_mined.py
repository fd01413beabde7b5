"""mined.py against the golden data and the loops in reference.py."""

import json
from pathlib import Path

import numpy as np
import reference
from hypothesis import given
from hypothesis import strategies as st

from fuselm.mined import pair_positions

GOLDEN = Path(__file__).parent / "data" / "golden"
tokens = st.lists(st.text("abé日", max_size=3), max_size=7)


def target_to_source(path: np.ndarray, targets: int) -> list[list[int]]:
    return [path[path[:, 1] == i, 0].tolist() for i in range(targets)]


def test_pairs_of_positions_are_the_golden_ones():
    cases = json.loads((GOLDEN / "dtw_alignment.json").read_bytes())["cases"]
    for case in cases:
        source, target = ([reference.without_marks(t) for t in case[f"{side}_tokens"]] for side in ("source", "target"))
        path = pair_positions(source, target)
        assert target_to_source(path, len(target)) == case["target_to_source"], case["text"]
        assert sum(reference.levenshtein(source[i], target[j]) for i, j in path) == case["dtw_cost"]
    assert len(cases) == 57


@given(tokens, tokens)
def test_pairs_of_positions_equal_the_reference(source, target):
    assert target_to_source(pair_positions(source, target), len(target)) == reference.dtw_pairs(source, target)
