"""Check the numbers of fidelity.py on traces made by hand."""

import math

import drawn
import numpy as np
import pytest

from fuselm.alignment.fidelity import Fidelity, judge_fidelity
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace

KEYS = {"own_bits_per_byte", "aligned_bits_per_byte", "fidelity", "coverage", "mass_lost"}


def make_trace(gold: list[float], tail: list[float], *, size: int, nats: float) -> Trace:
    """Return rows with one entry that has the mass outside the tail; a row with a tail of 1 has no information."""
    rows = [{3: 1 - t} if t < 1 else {} for t in tail]
    return Trace(
        document="d",
        size=size,
        nats=nats,
        tokens=np.full(len(gold), 3, np.int32),
        starts=np.arange(len(gold), dtype=np.int32),
        distributions=drawn.distributions_of(rows, tail, gold),
        weights=np.zeros((len(gold), 0), np.float32),
    )


LN2 = math.log(2)
SOURCE = make_trace([-3 * LN2, -2 * LN2], [0.5, 0.5], size=7, nats=5 * LN2)


def test_bits_per_byte_coverage_and_lost_mass():
    aligned = make_trace([-4 * LN2, 0.0, -2 * LN2], [0.25, 1.0, 0.5], size=7, nats=5 * LN2)
    sums = Fidelity()
    sums.add(SOURCE, aligned)
    assert sums.summarize() == pytest.approx(
        {
            "own_bits_per_byte": 5 / 7,
            "aligned_bits_per_byte": 6 / 7,
            "fidelity": 6 / 5,
            "coverage": 2 / 3,
            "mass_lost": (0.25 + 0.5) / 2,
        }
    )


def test_documents_are_summed_before_dividing():
    aligned = make_trace([-1 * LN2], [0.5], size=3, nats=2 * LN2)
    long, short = (SOURCE, SOURCE), (make_trace([-2 * LN2], [0.5], size=3, nats=2 * LN2), aligned)
    sums = Fidelity()
    sums.add(*long)
    sums.add(*short)
    assert sums.summarize()["fidelity"] == pytest.approx((5 + 1) / (5 + 2))
    assert sums.summarize()["own_bits_per_byte"] == pytest.approx(7 / 10)


def test_no_documents_and_no_text_are_finite():
    nothing = Trace(
        document="d",
        size=0,
        nats=0.0,
        tokens=np.zeros(0, np.int32),
        starts=np.zeros(0, np.int32),
        distributions=Distributions(
            offsets=np.zeros(1, np.int64),
            ids=np.zeros(0, np.int32),
            logprobs=np.zeros(0, np.float32),
            gold=np.zeros(0, np.float32),
            tail=np.zeros(0, np.float32),
        ),
        weights=np.zeros((0, 0), np.float32),
    )
    empty = Fidelity()
    empty.add(nothing, nothing)
    for summary in (Fidelity().summarize(), empty.summarize()):
        assert summary.keys() == KEYS
        assert summary["fidelity"] == 1 and all(map(math.isfinite, summary.values()))


@pytest.mark.parametrize(
    ("own_bits_informed", "fidelity", "word"),
    [
        (1.0, 1.0, "usable"),
        (0.95, 1.05, "usable"),
        (0.94, 0.7, "partly usable"),  # missing bits are no gain
        (1.0, 1.1, "partly usable"),
        (0.4, 1.0, "not usable"),
        (1.0, math.inf, "not usable"),
    ],
)
def test_the_verdict_depends_on_what_arrives_and_what_it_costs(own_bits_informed, fidelity, word):
    assert judge_fidelity(own_bits_informed, fidelity) == word
