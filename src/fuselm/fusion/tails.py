"""Model the tail of a row as a power law that starts where the kept entries end (docs/paper.md, "Fusion").

A row keeps its most probable ids and the mass t of all others. Fusion sometimes needs more about those others: their
entropy, their mass at another temperature, or the probability of an id that another source has kept. Their
probabilities are then assumed to fall with rank r as p_r = p_k (r / k)^-a, from rank k, the rank of the least kept
entry, to V, the size of the vocabulary; a is chosen so that they sum to t. In the logarithm of the rank, from 0 to
c = log(V / k), this is an exponential, so everything except a has a closed form: with x = (1 - a) c, the mass is
t = p_k k c (e^x - 1) / x.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.stores.distributions import Distributions

LEAST_MASS = 2.0**-24  # the precision of a tail, which is 1 minus a sum of float32
STEEPEST_SLOPE = -1e9  # the x of a tail without mass


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
    counts = d.counts
    last = np.full(len(d), -np.log(vocabulary_size))
    if d.informed.any():
        last[d.informed] = np.minimum.reduceat(d.logprobs.astype(np.float64), d.offsets[:-1][d.informed])
    ids = np.maximum(vocabulary_size - counts, 0)
    mass = np.where(ids > 0, np.maximum(d.tail.astype(np.float64), LEAST_MASS), 0.0)
    reach = np.log(vocabulary_size / np.clip(counts, 1, vocabulary_size))
    flat = mass >= np.exp(last) * ids  # the tail's mean is the least kept entry or more, so there is no decay
    last = np.where(flat & (ids > 0), np.log(np.maximum(mass, LEAST_MASS) / np.maximum(ids, 1)), last)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = mass / (np.exp(last) * np.clip(counts, 1, None) * reach)
    slope = np.where(flat, reach, _solve_slope(np.where(ids > 0, ratio, 0.0), reach))
    return Tails(mass=mass, last=last, reach=reach, slope=slope, ids=ids)


def compute_entropy(distributions: Distributions, vocabulary_size: int) -> Float[ndarray, "tokens"]:
    """Return each row's entropy in nats, tail included; a row without information has log of the vocabulary's size."""
    d, tails = distributions, fit_tails(distributions, vocabulary_size)
    logprobs = d.logprobs.astype(np.float64)
    kept = np.bincount(d.rows, weights=-np.exp(logprobs) * logprobs, minlength=len(d))
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
    logprobs = (d.logprobs.astype(np.float64) - largest[d.rows]) / temperature
    slope = tails.reach - (tails.reach - tails.slope) / temperature  # 1 - a/T times c
    counts = np.clip(d.counts, 1, None)
    tail = np.where(
        tails.ids > 0, np.exp((tails.last - largest) / temperature) * counts * tails.reach * _grow(slope), 0.0
    )
    total = np.bincount(d.rows, weights=np.exp(logprobs), minlength=len(d)) + tail
    log_total = np.log(np.where(d.informed, total, 1.0))
    return replace(
        d,
        logprobs=(logprobs - log_total[d.rows]).astype(np.float32),
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


def _solve_slope(ratio: Float[ndarray, "tokens"], most: Float[ndarray, "tokens"]) -> Float[ndarray, "tokens"]:
    """Find by bisection the x, at most `most`, with (e^x - 1) / x = ratio, which grows with x; x > -1 / ratio."""
    with np.errstate(divide="ignore"):
        low = np.maximum(-1.0 / ratio, STEEPEST_SLOPE)
    high = most.copy()
    for _ in range(60):
        middle = (low + high) / 2
        above = _grow(middle) > ratio
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
