"""Model the tail of a row as a power law that starts where the kept entries end (docs/paper.md, "Fusion").

A row keeps its most probable ids and the mass t of all others. Fusion sometimes needs more about those others: their
entropy, their mass at another temperature, or the probability of an id that another source has kept. Their
probabilities are then assumed to fall with rank r as p_r = p_k (r / k)^-a, from rank k, the rank of the least kept
entry, to V, the size of the vocabulary; a is chosen so that they sum to t. In the logarithm of the rank, from 0 to
c = log(V / k), this is an exponential, so everything except a has a closed form: with x = (1 - a) c, the mass is
t = p_k k c (e^x - 1) / x.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.stores.distributions import Distributions
from fuselm.system import index_checks
from fuselm.system.compiling import compiled

LEAST_MASS = 2.0**-24  # the precision of a tail, which is 1 minus a sum of float32
STEEPEST_SLOPE = -1e9  # the x of a tail without mass
STEEP = -45.0  # below this x, e^x - 1 is -1 in float64
HALVINGS = 60
NEWTON_STEPS = 30  # at most; one to eight are needed
DOUBT = 1e-12  # how far from a solution, over 1 + |x|, rounding could mistake on which side of it a value is


@dataclass(frozen=True, slots=True, kw_only=True)
class Tails:
    """Hold each row's tail: its mass, the least kept log-probability, c and x as above, and its number of ids."""

    mass: Float[ndarray, "tokens"]
    last: Float[ndarray, "tokens"]
    reach: Float[ndarray, "tokens"]  # c
    slope: Float[ndarray, "tokens"]  # x
    ids: Int[ndarray, "tokens"]

    @property
    def logprobs(self) -> Float[ndarray, "tokens"]:
        """Return the mean log-probability of an id drawn from the tail, which is at most the least kept one."""
        x = self.slope
        return self.last - (self.reach - x) * np.where(np.abs(x) < 1e-4, 0.5 + x / 12, _average_position(x))


def fit_tails(distributions: Distributions, vocabulary_size: int) -> Tails:
    """Fit the tails of all rows. A row without entries has all its mass in the tail, spread evenly."""
    d = distributions
    index_checks.require_offsets("rows", d.offsets, len(d.logprobs))
    index_checks.require_lengths("rows", len(d), d.tail, d.offsets[1:])
    counts = d.counts
    ids = np.maximum(vocabulary_size - counts, 0)
    last, mass = _find_edges(d.offsets, d.logprobs, d.tail, ids, -np.log(vocabulary_size))
    reach = np.log(vocabulary_size / np.clip(counts, 1, vocabulary_size))
    least = np.exp(last)
    flat = mass >= least * ids  # the tail's mean is the least kept entry or more, so there is no decay
    slope = _solve_slopes(mass, least * np.clip(counts, 1, None) * reach, reach, flat)
    if (even := flat & (ids > 0)).any():
        last[even] = np.log(mass[even] / ids[even])
    return Tails(mass=mass, last=last, reach=reach, slope=slope, ids=ids)


def compute_entropy(distributions: Distributions, vocabulary_size: int) -> Float[ndarray, "tokens"]:
    """Return each row's entropy in nats, tail included; a row without information has log of the vocabulary's size."""
    d, tails = distributions, fit_tails(distributions, vocabulary_size)
    logprobs = d.logprobs.astype(np.float64)
    kept = _sum_rows(d.offsets, -np.exp(logprobs) * logprobs)
    return np.where(d.informed, kept - tails.mass * tails.logprobs, np.log(vocabulary_size))


def apply_temperature(distributions: Distributions, temperature: float, vocabulary_size: int) -> Distributions:
    """Return p^(1/T), renormalized, for entries, tail and gold. A T above 1 flattens rows and moves mass to the tail.

    A power law raised to a power is again a power law, here of exponent a / T. So the mass of the new tail is known,
    and with it the scale of the entries.
    """
    if temperature == 1.0:
        return distributions
    d, tails = distributions, fit_tails(distributions, vocabulary_size)
    largest = np.zeros(len(d))  # each row's largest log-probability, so that powers of small ones do not vanish
    if d.informed.any():
        largest[d.informed] = np.maximum.reduceat(d.logprobs.astype(np.float64), d.offsets[:-1][d.informed])
    rows = d.rows
    logprobs = (d.logprobs.astype(np.float64) - largest[rows]) / temperature
    slope = tails.reach - (tails.reach - tails.slope) / temperature  # 1 - a/T times c
    counts = np.clip(d.counts, 1, None)
    tail = np.where(
        tails.ids > 0, np.exp((tails.last - largest) / temperature) * counts * tails.reach * _grow(slope), 0.0
    )
    total = _sum_rows(d.offsets, np.exp(logprobs)) + tail
    log_total = np.log(np.where(d.informed, total, 1.0))
    return replace(
        d,
        logprobs=(logprobs - log_total[rows]).astype(np.float32),
        gold=np.minimum(np.where(d.informed, (d.gold - largest) / temperature - log_total, d.gold), 0.0).astype(
            np.float32
        ),
        tail=np.where(d.informed, tail / np.where(d.informed, total, 1.0), d.tail).astype(np.float32),
    )


def _grow(x: Float[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
    """Return (e^x - 1) / x."""
    return np.where(np.abs(x) < 1e-8, 1.0 + x / 2, np.expm1(x) / np.where(x == 0, 1.0, x))


def _average_position(x: Float[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
    """Return the mean of u / c under the density e^(x u / c): 1 / (1 - e^-x) - 1 / x."""
    safe = np.where(np.abs(x) < 1e-4, 1.0, x)
    with np.errstate(over="ignore"):
        return -1.0 / np.expm1(-safe) - 1.0 / safe


def _sum_rows(offsets: Int[ndarray, "edges"], values: Float[ndarray, "entries"]) -> Float[ndarray, "tokens"]:
    index_checks.require_offsets("rows", offsets, len(values))
    return _sum_entries(offsets, values)


@no_type_check
@compiled(nogil=True)
def _sum_entries(offsets, values):
    sums = np.zeros(len(offsets) - 1)
    for row in range(len(sums)):
        for entry in range(offsets[row], offsets[row + 1]):
            sums[row] += values[entry]
    return sums


@no_type_check
@compiled(nogil=True)
def _find_edges(offsets, logprobs, tail, ids, even):
    """Return each row's least log-probability, which is `even` without entries, and the mass of its tail."""
    last, mass = np.full(len(tail), even), np.zeros(len(tail))
    for row in range(len(tail)):
        for entry in range(offsets[row], offsets[row + 1]):
            value = np.float64(logprobs[entry])
            if entry == offsets[row] or value < last[row]:
                last[row] = value
        if ids[row] > 0:
            mass[row] = max(np.float64(tail[row]), LEAST_MASS)
    return last, mass


def _solve_slopes(
    mass: Float[ndarray, "tokens"],
    steepest: Float[ndarray, "tokens"],
    most: Float[ndarray, "tokens"],
    flat: Bool[ndarray, "tokens"],
) -> Float[ndarray, "tokens"]:
    """Return the x of each row, which is at most `most`: (e^x - 1) / x = mass / steepest. In a flat tail it is `most`.

    The left side grows with x, and x > -steepest / mass.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = mass / steepest
        return _solve(ratios, np.maximum(-1.0 / ratios, STEEPEST_SLOPE), most, flat)


@no_type_check
@compiled(nogil=True)
def _solve(ratios, lowest, most, flat):
    """Return what `HALVINGS` steps of bisection find.

    Newton's method finds the solution first. So the left side is computed for those halvings alone that are so close to
    it that rounding decides.
    """
    slopes = most.copy()
    for row in range(len(slopes)):
        if flat[row]:
            continue
        ratio, low, high = ratios[row], lowest[row], most[row]
        if STEEPEST_SLOPE < low < STEEP:
            slopes[row] = _solve_steep(ratio, low)
            continue
        solution, doubt = low, np.inf
        if low > STEEPEST_SLOPE and high > low and ratio < 1e300:
            solution = _approach(ratio, low, high)
            doubt = DOUBT * (1.0 + abs(solution))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_last = False
            if abs(middle - solution) > doubt:
                is_above = middle > solution
            else:
                is_above = _grow_one(middle) > ratio
                is_last = middle == low or middle == high  # there is no number between them
            low, high = low if is_above else middle, middle if is_above else high
            if is_last:
                break
        slopes[row] = (low + high) / 2
    return slopes


@no_type_check
@compiled(nogil=True)
def _solve_steep(ratio, low):
    """Return what bisection finds where the left side is -1 / x, from the x that is -1 / ratio but for rounding."""
    following = np.nextafter(low, 0.0)
    while -1.0 / following <= ratio:
        low, following = following, np.nextafter(following, 0.0)
    return (low + following) / 2


@no_type_check
@compiled(nogil=True)
def _approach(ratio, low, high):
    """Find the x with log((e^x - 1) / x) = log(ratio) by Newton's method; the left side is convex."""
    wanted = np.log(ratio)
    x = low if ratio < 0.5 else min(max(2.0 * wanted, low), high)
    for _ in range(NEWTON_STEPS):
        grown = _grow_one(x)
        step = (np.log(grown) - wanted) / _find_position(x)
        before, x = x, min(max(x - step, low), high)
        if abs(x - before) <= 1e-15 * (1.0 + abs(x)):
            break
    return x


@no_type_check
@compiled(nogil=True)
def _find_position(x):
    """Return what `_average_position` does: the derivative of log((e^x - 1) / x)."""
    if abs(x) < 1e-4:
        return 0.5 + x / 12
    return -1.0 / np.expm1(-x) - 1.0 / x if x > -700.0 else -1.0 / x


@no_type_check
@compiled(nogil=True)
def _grow_one(x):
    """Return (e^x - 1) / x."""
    return 1.0 + x / 2 if abs(x) < 1e-8 else np.expm1(x) / x
