"""Find 95% intervals over seeds and documents together, of numbers that several seeds have.

Each seed is another split of the texts and another training, and says how much both change a number. Documents say how
much the choice of texts does. The variance of the mean over n seeds is taken as s²/n + v: s² is the variance of the
seeds' numbers, v that of a bootstrap over documents. Seeds share documents, so s² has a part of v, and the interval is
rather too wide than too narrow. Its quantile is Student's, with the degrees of freedom of Welch and Satterthwaite: n-1
where seeds differ much more than documents make them, and more otherwise. With few seeds that is much wider than a
bootstrap over seeds, which would have 27 samples of three.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
SMALLEST = 0.003  # bits per byte: another training order alone may change as much, so one seed cannot tell less
STEPS = 20_000  # of an integral over angles; the quantiles are good to four digits
LARGEST = 1e6  # degrees of freedom beyond which Student's distribution is the normal one


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedInterval:
    """Hold a 95% interval over seeds and documents, and the probability of such a value if the true one were 0."""

    low: float
    high: float
    p: float


def find_seed_interval(value: float, by_seed: Sequence[float], document_error: float) -> SeedInterval:
    """Return the interval of a value from each seed's own and the standard error over documents.

    One seed says nothing about others; the interval is then over documents alone.
    """
    seeds = len(by_seed)
    between = float(np.var(by_seed, ddof=1)) / seeds if seeds > 1 else 0.0
    variance = between + document_error**2
    if variance == 0.0:
        return SeedInterval(low=value, high=value, p=1.0 if value == 0 else 0.0)
    freedom = min((seeds - 1) * (variance / between) ** 2, LARGEST) if between > 0 else LARGEST
    error = math.sqrt(variance)
    reach = compute_student_quantile((1 + LEVEL) / 2, freedom) * error
    return SeedInterval(low=value - reach, high=value + reach, p=compute_student_p(value / error, freedom))


def compute_student_quantile(probability: float, freedom: float) -> float:
    """Return the value that Student's t with so many degrees of freedom stays below with this probability, over 1/2."""
    angles, below = _integrate(freedom)
    return math.sqrt(freedom) * math.tan(float(np.interp(probability - 0.5, below, angles)))


def compute_student_p(statistic: float, freedom: float) -> float:
    """Return the probability that Student's t is at least as far from 0 on either side."""
    angles, below = _integrate(freedom)
    angle = math.atan(abs(statistic) / math.sqrt(freedom))
    return float(max(1 - 2 * np.interp(angle, angles, below), 0.0))


def _integrate(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles, and Student's probability of lying between 0 and each; t is sqrt(freedom) times the tangent."""
    last = min(math.pi / 2, 40 / math.sqrt(freedom))  # beyond that the density of many degrees of freedom is 0
    angles = np.linspace(0.0, last, STEPS + 1)
    density = np.exp((freedom - 1) * np.log(np.maximum(np.cos(angles), 1e-300)))
    sums = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, 0.5 * sums / sums[-1]


def adjust_for_comparisons(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values of several comparisons adjusted by Holm's method, which bounds the chance of any mistake."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
