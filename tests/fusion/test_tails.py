"""Compare tails.py with the loops in reference.py, with quadrature, and with rows that are known in full."""

import math

import drawn
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from fuselm.fusion import tails
from fuselm.stores.distributions import Distributions, check_distributions

VOCAB = 997
some = settings(max_examples=60)


@st.composite
def rows(draw) -> list[tuple[reference.Row, float]]:
    """Draw pairs of a row and its tail from more or less even distributions; some rows have no information."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out = []
    for _ in range(draw(st.integers(0, 5))):
        kept = draw(st.sampled_from([0, 1, 2, 13, VOCAB - 1, VOCAB]))
        p = np.sort(random.dirichlet(np.full(VOCAB, draw(st.sampled_from([0.05, 0.5, 5.0])))) + 1e-9)[::-1]
        p /= p.sum()
        out.append((dict(enumerate(p[:kept].tolist())), float(p[kept:].sum())))
    return out


def build_rows(rows: list[tuple[reference.Row, float]]) -> Distributions:
    gold = [math.log(row[0]) if row else 0.0 for row, _ in rows]
    return drawn.distributions_of([row for row, _ in rows], [tail for _, tail in rows], gold)


@some
@given(rows=rows())
def test_entropy_equals_the_reference(rows):
    expected = [reference.entropy(row, tail, VOCAB) for row, tail in rows]
    np.testing.assert_allclose(tails.compute_entropy(build_rows(rows), VOCAB), expected, rtol=1e-4, atol=1e-4)


@some
@given(rows=rows(), temperature=st.sampled_from([0.3, 0.9, 1.1, 4.0]))
def test_applying_a_temperature_equals_the_reference(rows, temperature):
    made = tails.apply_temperature(build_rows(rows), temperature, VOCAB)
    check_distributions(made, VOCAB)
    for i, (row, tail) in enumerate(rows):
        expected, beyond, log_total = reference.tempered(row, tail, temperature, VOCAB) if row else ({}, 1.0, 0.0)
        assert drawn.row_of(*made.row(i)) == pytest.approx(expected, rel=1e-3)
        assert made.tail[i] == pytest.approx(beyond, rel=1e-3, abs=1e-6)
        gold = min(math.log(row[0]) / temperature - log_total, 0.0) if row else 0.0
        assert made.gold[i] == pytest.approx(gold, abs=1e-4)


@pytest.mark.parametrize("most", [0.4, 0.01, 1e-7])
def test_a_temperature_near_0_keeps_only_the_most_probable(most):
    made = tails.apply_temperature(build_rows([({0: 0.6 * most, 7: most, 3: 0.5 * most}, 0.0)]), 1e-3, VOCAB)
    check_distributions(made, VOCAB)
    kept = drawn.row_of(*made.row(0))
    assert kept[7] == pytest.approx(1, abs=1e-6) and kept[0] + kept[3] + made.tail[0] < 1e-6
    assert made.gold[0] == pytest.approx(math.log(0.6) / 1e-3, rel=1e-4)


@some
@given(rows=rows())
def test_temperature_one_changes_nothing_and_one_near_it_changes_little(rows):
    before = build_rows(rows)
    assert tails.apply_temperature(before, 1.0, VOCAB) is before
    near = tails.apply_temperature(before, 1 + 1e-6, VOCAB)
    np.testing.assert_allclose(near.logprobs, before.logprobs, atol=1e-3)
    np.testing.assert_allclose(near.tail, before.tail, atol=1e-3)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.99, 1.0, 1.3, 3.0, 40.0])
def test_the_power_law_of_a_tail_is_found_from_its_mass(exponent):
    kept, last = 13, 1e-4
    grid = np.linspace(0, math.log(VOCAB / kept), 200_001)  # logarithm of rank over kept
    density = last * np.exp(-exponent * grid) * kept * np.exp(grid)
    mass = np.trapezoid(density, grid)
    mean = np.trapezoid(density * (math.log(last) - exponent * grid), grid) / mass
    first = 1 - 12 * last - mass
    found = tails.fit_tails(build_rows([({0: first, **dict.fromkeys(range(1, kept), last)}, float(mass))]), VOCAB)
    assert found.logprobs[0] == pytest.approx(mean, abs=1e-3)
    assert found.ids.tolist() == [VOCAB - kept]


def zipf(exponent: float, size: int = 49_152) -> ndarray:
    p = np.arange(2, size + 2, dtype=np.float64) ** -exponent
    return p / p.sum()


@pytest.mark.parametrize("exponent", [0.9, 1.2, 1.6])
@pytest.mark.parametrize("temperature", [0.7, 1.2, 1.5])
def test_the_entropy_and_mass_of_a_power_law_tail_are_found(exponent, temperature):
    p = zipf(exponent)
    cut = build_rows([(dict(enumerate(p[:61].tolist())), float(p[61:].sum()))])
    assert tails.compute_entropy(cut, len(p))[0] == pytest.approx(-(p * np.log(p)).sum(), rel=0.01)
    powers = p ** (1 / temperature)
    powers /= powers.sum()
    assert tails.apply_temperature(cut, temperature, len(p)).tail[0] == pytest.approx(powers[61:].sum(), rel=0.05)


def test_an_id_of_the_tail_is_never_more_probable_than_a_kept_one():
    rows = [({0: 0.5, 1: 0.1}, 0.4), ({0: 0.9}, 0.1), ({0: 1 - 1e-7}, 1e-7)]
    found = tails.fit_tails(build_rows(rows), VOCAB)
    assert (found.logprobs <= np.log([0.1, 0.9, 1.0]) + 1e-6).all()


def bisect(ratio: float, most: float) -> float:
    """Find the x, at most `most`, with (e^x - 1) / x = ratio, by 60 halvings."""
    low, high = max(-1.0 / ratio, tails.STEEPEST_SLOPE), most
    for _ in range(60):
        middle = (low + high) / 2
        grown = 1.0 + middle / 2 if abs(middle) < 1e-8 else math.expm1(middle) / middle
        low, high = (low, middle) if grown > ratio else (middle, high)
    return (low + high) / 2


def test_slopes_are_those_of_bisection_to_the_bit():
    random = np.random.default_rng(0)
    ratios = np.append(np.exp(random.uniform(math.log(1e-11), math.log(1e3), 5000)), [0.5, 1.0, 1.0 + 1e-12, 1e-9])
    most = np.log(random.integers(2, 200_000, len(ratios)) / random.integers(1, 2, len(ratios)))
    found = tails._solve_slopes(ratios, np.ones_like(ratios), most, np.zeros(len(ratios), bool))
    assert found.tolist() == list(map(bisect, ratios.tolist(), most.tolist()))
    assert np.array_equal(tails._solve_slopes(ratios, ratios, most, np.ones(len(ratios), bool)), most)
