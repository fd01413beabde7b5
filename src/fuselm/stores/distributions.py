"""Sparse next-token distributions, one row a token, and their few operations.

A row holds natural-log probabilities of some ids (distinct) and the mass of all others, its tail: they sum to 1.
A row without entries (its tail is 1) carries no information. Gold is the log-probability of the token that really
came, whether or not it is among the entries; it is 0 in a row without information. DESIGN.md section 3.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """Row i is the distribution of token i: entries `offsets[i]` to `offsets[i+1]`."""

    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]
    gold: Float[ndarray, "tokens"]
    tail: Float[ndarray, "tokens"]
    offsets: Int[ndarray, "tokens+1"]

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def counts(self) -> Int[ndarray, "tokens"]:
        return np.diff(self.offsets)

    @property
    def informed(self) -> Bool[ndarray, "tokens"]:
        """Which rows carry information."""
        return self.counts > 0

    @property
    def rows(self) -> Int[ndarray, "entries"]:
        """The row that each entry is in."""
        return np.repeat(np.arange(len(self)), self.counts)

    @classmethod
    def from_masses(
        cls,
        rows: Int[ndarray, "contributions"],
        ids: Int[ndarray, "contributions"],
        masses: Float[ndarray, "contributions"],
        gold_ids: Int[ndarray, "tokens"],
        informed: Bool[ndarray, "tokens"],
        top_k: int,
    ) -> "Distributions":
        """Add up the masses that meet on one id of one row, and keep the `top_k` largest of each row.

        Whatever a row misses to 1 is its tail. Gold is taken before the cut; a gold id that got no mass has -inf.
        """
        tokens = len(gold_ids)
        base = int(max(ids.max(initial=0), gold_ids.max(initial=0))) + 1
        keys, inverse = np.unique(rows.astype(np.int64) * base + ids, return_inverse=True)
        totals = np.bincount(inverse, weights=masses, minlength=len(keys))
        keys, totals = keys[totals > 0], totals[totals > 0]
        rows, ids = keys // base, keys % base

        gold = np.full(tokens, -np.inf)
        is_gold = ids == gold_ids[rows]
        gold[rows[is_gold]] = np.log(totals[is_gold])
        gold[~informed] = 0.0

        order = np.lexsort((ids, -totals, rows))
        rows, ids, totals = rows[order], ids[order], totals[order]
        first = np.searchsorted(rows, np.arange(tokens))
        kept = np.arange(len(rows)) - first[rows] < top_k
        rows, ids, totals = rows[kept], ids[kept], totals[kept]
        sums = np.bincount(rows, weights=totals, minlength=tokens)
        return cls(
            offsets=np.append(0, np.cumsum(np.bincount(rows, minlength=tokens))).astype(np.int64),
            ids=ids.astype(np.int32),
            logprobs=np.log(totals).astype(np.float32),
            gold=np.minimum(gold, 0.0).astype(np.float32),
            tail=np.clip(1.0 - sums, 0.0, 1.0).astype(np.float32),
        )

    def row(self, i: int) -> tuple[Int[ndarray, "k"], Float[ndarray, "k"]]:
        """Ids and log-probabilities of row i, most probable first as far as its maker sorted them so."""
        entries = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.ids[entries], self.logprobs[entries]


def check(distributions: Distributions, vocabulary_size: int) -> None:
    """Raises `ValueError` on what no distribution can be: NaN, mass above 1, ids outside the vocabulary."""
    d = distributions
    nan = np.isnan(d.gold) | np.isnan(d.tail)
    nan[d.rows[np.isnan(d.logprobs)]] = True
    if nan.any():
        raise ValueError(f"row {int(nan.argmax())}: the distribution holds NaN")
    outside = d.ids[(d.ids < 0) | (d.ids >= vocabulary_size)]
    if len(outside):
        raise ValueError(f"id {int(outside[0])} is outside the vocabulary of {vocabulary_size}")
    sums = np.bincount(d.rows, weights=np.exp(d.logprobs.astype(np.float64)), minlength=len(d)) + d.tail
    if len(d) and np.abs(sums - 1).max() > 1e-3:
        row = int(np.abs(sums - 1).argmax())
        raise ValueError(f"row {row}: entries and tail sum to {sums[row]:.4f}, not 1")
