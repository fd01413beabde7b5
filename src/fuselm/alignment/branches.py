"""Give every branch that a source may take the target's tokens that text would have there: the method `branches`.

`span` refines only the branch that the text takes, by rows that begin inside its token. Here all branches are alike. An
entry of a row leaves the text together with what may follow it (followers.py), is split as the target's tokenizer
splits it after the text before it (branch_splits.py), and votes where its first other token is (branch_votes.py). That
may be a token before the row, which it makes longer. docs/paper.md, "`branches` alignment", has the formulas.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment.blind_rows import predict_tokens
from fuselm.alignment.branch_splits import Splits, Splitter
from fuselm.alignment.branch_votes import BranchRows, sum_votes
from fuselm.alignment.followers import Followers
from fuselm.alignment.stretches import cut_into_stretches, place_rows
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace


class BranchAligner:
    """Make rows of one source in one target's tokens, and remember how strings are split."""

    def __init__(self, source: Vocabulary, target: Vocabulary, followers: Followers):
        self._source, self._target_size = source, target.size
        self._splitter = Splitter(source, target, followers)

    def align(
        self, trace: Trace, segmentation: Segmentation, data: bytes, exact: Distributions, top_k: int
    ) -> Distributions:
        """Return the rows of the target's tokens, with the gold log-probabilities of `exact`, the rows of `span`.

        What is unknown after a branch is left out, and a row is divided by what is known. Tokens to which `exact` gives
        no information get none.
        """
        parts = [
            (tokens, self._align_stretch(*stretch, top_k))
            for tokens, stretch in cut_into_stretches(self._source, trace, segmentation, data)
        ]
        d = place_rows(len(segmentation.ids), parts)
        return Distributions(offsets=d.offsets, ids=d.ids, logprobs=d.logprobs, gold=exact.gold, tail=d.tail)

    def predict_tokens(self, trace: Trace, segmentation: Segmentation, data: bytes) -> Float[ndarray, "tokens"]:
        """Return the natural logs of what rows that do not look give to each token that came (blind_rows.py).

        The rows of `trace` must have its tokens among their entries.
        """
        result = np.zeros(len(segmentation.ids))
        for at, (tokens, begins, d, target_ids, target_begins, stream) in cut_into_stretches(
            self._source, trace, segmentation, data
        ):
            if len(tokens) and len(target_ids):
                rows, splits = self._find_rows(tokens, begins, d, target_begins, stream)
                result[at] = predict_tokens(rows, target_ids, target_begins, splits, self._target_size)
        return result

    def _align_stretch(
        self,
        tokens: Int[ndarray, "rows"],
        begins: Int[ndarray, "rows"],
        d: Distributions,
        target_ids: Int[ndarray, "tokens"],
        target_begins: Int[ndarray, "tokens+1"],
        stream: UInt8[ndarray, "bytes"],
        top_k: int,
    ) -> Distributions:
        if not len(tokens) or not len(target_ids):
            return place_rows(len(target_ids), [])
        rows, splits = self._find_rows(tokens, begins, d, target_begins, stream)
        offsets, ids, masses, tail = sum_votes(rows, target_ids, target_begins, splits, top_k)
        logprobs = np.minimum(np.log(masses), 0.0).astype(np.float32)
        return Distributions(
            offsets=offsets, ids=ids, logprobs=logprobs, gold=np.zeros(len(tail), np.float32), tail=tail
        )

    def _find_rows(
        self,
        tokens: Int[ndarray, "rows"],
        begins: Int[ndarray, "rows"],
        d: Distributions,
        target_begins: Int[ndarray, "edges"],
        stream: UInt8[ndarray, "bytes"],
    ) -> tuple[BranchRows, Splits]:
        within = (np.searchsorted(target_begins[:-1], begins, side="right") - 1).clip(0)
        slots, first_tokens, splits = self._splitter.split(begins, d, within, target_begins, stream)
        masses, gold = np.exp(d.logprobs, dtype=np.float64), np.exp(d.gold, dtype=np.float64)
        if begins[0] < target_begins[0]:  # entries that do not begin with the hidden space are impossible
            first, is_gold = slice(0, int(d.offsets[1])), d.ids[: d.offsets[1]] == tokens[0]
            possible = (slots[first] >= 0) & (splits.first[slots[first] + 1] > splits.first[slots[first]])
            masses[first] *= possible | is_gold
            if whole := masses[first].sum() + (0.0 if is_gold.any() else gold[0]):
                masses[first], gold[0] = masses[first] / whole, gold[0] / whole
        tail = d.tail.astype(np.float64)
        return BranchRows(tokens, begins, within, d.offsets, d.ids, masses, gold, tail, slots, first_tokens), splits
