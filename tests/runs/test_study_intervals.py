"""Intervals of a study: over seeds and documents where there are several seeds, else over documents."""

import numpy as np
import pytest

from fuselm.results.bootstrap import Bootstrap
from fuselm.results.scoring import Score
from fuselm.runs.studies.comparison import Pools, _adjust_p_values


def draw_scores(seed: int, shift: float) -> list[Score]:
    """Score 31 documents of two domains; `shift` is added to each one's bits per byte."""
    chance = np.random.default_rng(seed)
    sizes = chance.integers(90, 110, size=31)
    values = chance.normal(1.0, 0.1, size=31) + shift
    return [
        Score(document=f"{n}", domain="ab"[n % 2], bits=float(v * size), bytes=int(size))
        for n, (v, size) in enumerate(zip(values, sizes, strict=True))
    ]


SHIFTS = {0: -0.04, 1: -0.03, 2: -0.02}
POOLS = Pools(
    {
        "clm": {seed: draw_scores(seed, 0.0) for seed in SHIFTS},
        "fused": {seed: draw_scores(seed, shift) for seed, shift in SHIFTS.items()},
    }
)


def test_the_interval_of_several_seeds_is_over_both():
    cells = POOLS.compute_intervals((0, 1, 2), "fused", "clm")
    for cell in cells.values():
        assert cell["value"] == pytest.approx(-0.03, abs=1e-3)
        low, high = cell["documents"]  # all documents of a seed are shifted alike, so documents say too little
        assert low > -0.035 and high < -0.025
        assert cell["low"] < -0.05 and cell["high"] > -0.01
        assert 0.02 < cell["p"] < 0.06  # Student's t of 0.03 over 0.01 / sqrt(3), two degrees of freedom


def test_the_interval_of_one_seed_is_over_its_documents():
    cells = POOLS.compute_intervals((1,), "fused", "clm")
    expected = Bootstrap(draw_scores(1, 0.0)).find_intervals(draw_scores(1, -0.03), draw_scores(1, 0.0))
    assert {n: (c["low"], c["high"]) for n, c in cells.items()} == {n: (i.low, i.high) for n, i in expected.items()}
    assert all("documents" not in cell for cell in cells.values())


def test_p_values_are_adjusted_for_the_comparisons_of_a_table():
    table = {"one": {"average": {"p": 0.02}}, "two": {"average": {"p": 0.03}}, "none": None, "few": {"average": {}}}
    assert _adjust_p_values(table) == pytest.approx({"one": 0.04, "two": 0.04})
