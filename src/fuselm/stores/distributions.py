"""Hold sparse next-token distributions, one row per token, and the few operations on them.

A row holds natural-log probabilities of some distinct ids, and the total probability of all other ids, called its tail;
together they sum to 1. A row without entries has a tail of 1 and carries no information. Gold is the log-probability of
the token that the document really has there, whether or not it is among the entries; it is 0 in a row without
information. docs/store.md describes the same fields on disk.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """Hold the next-token distribution of every token of a document.

    Row i is the distribution of token i; its entries are `offsets[i]` to `offsets[i + 1]` of the flat arrays.

    - `ids`, shape (entries): token ids, distinct within a row.
    - `logprobs`, shape (entries): natural logs of their probabilities.
    - `gold`, shape (tokens): natural log of the probability of the document's own token; 0 in a row without entries.
    - `tail`, shape (tokens): the probability of all ids that are not entries, from 0 to 1; 1 in a row without entries.
    - `offsets`, shape (tokens + 1): ascending from 0 to the number of entries.

    >>> import numpy as np
    >>> from fuselm.stores.distributions import Distributions
    >>> distributions = Distributions(
    ...     ids=np.array([7, 3]),
    ...     logprobs=np.log(np.array([0.5, 0.25])),
    ...     gold=np.array([np.log(0.25), 0.0]),
    ...     tail=np.array([0.25, 1.0]),
    ...     offsets=np.array([0, 2, 2]),
    ... )
    >>> len(distributions)
    2
    >>> distributions.informed
    array([ True, False])
    >>> ids, logprobs = distributions.row(0)
    >>> dict(zip(ids.tolist(), np.exp(logprobs).round(4).tolist()))
    {7: 0.5, 3: 0.25}
    """

    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]
    gold: Float[ndarray, "tokens"]
    tail: Float[ndarray, "tokens"]
    offsets: Int[ndarray, "tokens+1"]

    def __len__(self) -> int:
        return len(self.gold)

    def __repr__(self) -> str:
        return f"Distributions({len(self):,} rows, {len(self.ids):,} entries)"

    @property
    def counts(self) -> Int[ndarray, "tokens"]:
        return np.diff(self.offsets)

    @property
    def informed(self) -> Bool[ndarray, "tokens"]:
        """Flag the rows that carry information, which are those with entries."""
        return self.counts > 0

    @property
    def rows(self) -> Int[ndarray, "entries"]:
        """Return the number of the row that each entry is in."""
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
        """Build rows from contributions of probability, keeping the `top_k` largest entries of each row.

        Contributions to the same id of the same row are added up. Whatever a row lacks to sum to 1 becomes its tail.
        Gold is taken before the cut to `top_k`; a gold id without any contribution gets -inf.
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
        """Return the ids and natural-log probabilities of row i, in the order in which they are stored.

        Row -1 is the last. Raises `IndexError` if there is no such row.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i}: there are {len(self)} rows")
        i %= len(self)
        entries = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.ids[entries], self.logprobs[entries]


def check_distributions(distributions: Distributions, vocabulary_size: int) -> None:
    """Raise `ValueError` for NaN, a row that does not sum to 1, or an id outside the vocabulary."""
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
