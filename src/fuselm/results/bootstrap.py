"""Find 95% intervals of bits per byte, by a bootstrap over documents; `seed_intervals` adds those over seeds.

Documents are resampled within each domain. A difference of two models resamples the same documents for both.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.results.scoring import Score, compute_unspelled_shares

RESAMPLES = 10_000
LEVEL = 0.95
# A percentile interval lies between the smallest and the largest document. With n documents, all of them are above the
# median of their population, or all below it, with a probability of 2^(1-n): 1 for one document, 1/2 for two, 6.25 %
# for five. The interval then misses it. Only from six documents on is that less than the 5 % that it may miss.
FEWEST_DOCUMENTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Hold a value and its 95% interval, None where a domain has fewer than `FEWEST_DOCUMENTS` documents."""

    value: float
    low: float | None
    high: float | None


class Resampled(NamedTuple):
    """Hold a model's bits per byte on all documents and on each resample; columns are domains, then their mean."""

    value: Float[ndarray, "columns"]
    samples: Float[ndarray, "resamples columns"]


class Bootstrap:
    """Resample documents, in the same way for every model and every difference of models."""

    def __init__(self, documents: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0):
        self.order = sorted({(s.domain, s.document) for s in documents})
        self.domains = sorted({domain for domain, _ in self.order})
        self._resamples = resamples
        self._seed = seed

    def find_intervals(self, *scores: Sequence[Score]) -> dict[str, Interval]:
        """Return a model's bits per byte with their intervals, by domain and `average`.

        With the scores of two models, return those of the first minus the second.
        """
        return self.compare(*map(self.resample, scores))

    def compare(self, first: Resampled, *others: Resampled) -> dict[str, Interval]:
        """Return the intervals of the first minus all others, by domain and `average`."""
        value, samples = first
        for other in others:
            value, samples = value - other.value, samples - other.samples
        low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        names = [*self.domains, "average"]
        counts = Counter(domain for domain, _ in self.order)
        few = {d for d in self.domains if counts[d] < FEWEST_DOCUMENTS}
        unknown = few | ({"average"} if few else set())
        return {
            n: Interval(value=v, low=None if n in unknown else lo, high=None if n in unknown else hi)
            for n, v, lo, hi in zip(names, value.tolist(), low.tolist(), high.tolist(), strict=True)
        }

    def compute_errors(self, first: Resampled, *others: Resampled) -> dict[str, float]:
        """Return the standard errors over documents of the first minus all others, by domain and `average`."""
        samples = first.samples
        for other in others:
            samples = samples - other.samples
        return dict(zip([*self.domains, "average"], samples.std(axis=0).tolist(), strict=True))

    def resample(self, scores: Sequence[Score]) -> Resampled:
        """Return one model's bits per byte by domain and on average, on all documents and on each resample."""
        by_document = {(s.domain, s.document): s for s in scores}
        values, samples = [], []
        for n, domain in enumerate(self.domains):
            members = [by_document[key] for key in self.order if key[0] == domain]
            bits = np.array([s.bits for s in members])
            sizes = np.array([s.bytes for s in members], np.float64)
            values.append(bits.sum() / sizes.sum())
            drawn = np.random.default_rng([self._seed, n]).multinomial(
                len(members), np.full(len(members), 1 / len(members)), size=self._resamples
            )
            samples.append(drawn @ bits / (drawn @ sizes))
        columns, table = np.array(values), np.stack(samples, axis=1)
        return Resampled(np.append(columns, columns.mean()), np.column_stack([table, table.mean(axis=1)]))


def pool_seeds(seeds: Sequence[Sequence[Score]]) -> list[Score]:
    """Merge the scores of several seeds: add up each document's bits and bytes over the seeds that held it out.

    A resample then draws a document with everything that was scored on it, because a text that several seeds hold out
    is still one text.
    """
    sums: dict[tuple[str, str], tuple[float, int, int]] = {}
    for score in itertools.chain.from_iterable(seeds):
        bits, size, lacking = sums.get((score.domain, score.document), (0.0, 0, 0))
        sums[score.domain, score.document] = (bits + score.bits, size + score.bytes, lacking + score.unspelled)
    return [
        Score(document=document, domain=domain, bits=bits, bytes=size, unspelled=lacking)
        for (domain, document), (bits, size, lacking) in sums.items()
    ]


def summarize_scores(scores: Mapping[str, Sequence[Score]], pairs: Sequence[tuple[str, str]]) -> dict:
    """Return every model's bits per byte, and the differences named in `pairs`, each with its interval."""
    bootstrap = Bootstrap(next(iter(scores.values())))

    def row(intervals: Mapping[str, Interval], key: str) -> dict:
        cells = {n: {key: i.value, "low": i.low, "high": i.high} for n, i in intervals.items()}
        return {"domains": {n: c for n, c in cells.items() if n != "average"}, "average": cells["average"]}

    def with_unspelled(row: dict, shares: Mapping[str, float]) -> dict:
        for domain, share in shares.items():
            (row["average"] if domain == "average" else row["domains"][domain])["unspelled"] = share
        return row

    return {
        "models": {
            name: with_unspelled(row(bootstrap.find_intervals(s), "bits_per_byte"), compute_unspelled_shares(s))
            for name, s in scores.items()
        },
        "differences": {f"{a}-{b}": row(bootstrap.find_intervals(scores[a], scores[b]), "value") for a, b in pairs},
    }
