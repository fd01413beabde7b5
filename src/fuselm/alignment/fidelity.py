"""Measure how much of a source survives its alignment.

Fidelity is the bits that the aligned distributions give to a text over the bits that the source itself gives to it:
1 is perfect. It says little where coverage is below 1: a target position without information counts 0 bits, for the
paper's fallback there is one-hot on the gold token. So `judge_fidelity` goes by the share of the source's bits that lie
in spans with information, and by the fidelity within those (span_losses.py). It says nothing about the tokens that did
not come: conditionals.py does.
"""

import math
from dataclasses import dataclass

import numpy as np

from fuselm.models.segmentation import BITS_PER_UNSPELLED_BYTE
from fuselm.stores.store import Trace

# The least share of the source's bits in informed spans, the largest fidelity there, the least conditional fidelity.
VERDICTS = {"usable": (0.95, 1.05, 0.9), "partly usable": (0.5, 1.25, 0.0), "not usable": (0.0, math.inf, 0.0)}


@dataclass(slots=True, kw_only=True)
class Fidelity:
    """Sum over documents; `add` takes a trace and what alignment made of it."""

    bytes: int = 0
    tokens: int = 0
    own_nats: float = 0.0
    aligned_nats: float = 0.0
    informed: int = 0
    tail: float = 0.0  # of rows with information
    unspelled: int = 0  # bytes

    def add(self, source: Trace, aligned: Trace, unspelled: int = 0) -> None:
        """Add a document, of which the source does not spell so many bytes."""
        d = aligned.distributions
        self.bytes += source.size
        self.tokens += len(d)
        self.own_nats -= float(source.distributions.gold.astype(np.float64).sum())  # `nats` but for rounding
        self.own_nats += unspelled * BITS_PER_UNSPELLED_BYTE * math.log(2)
        self.unspelled += unspelled
        self.aligned_nats -= float(d.gold.astype(np.float64).sum())
        self.informed += int(d.informed.sum())
        self.tail += float(d.tail[d.informed].astype(np.float64).sum())

    def summarize(self) -> dict[str, float]:
        """Return the numbers of these documents.

        `mass_lost` is the mean mass that reached no target id, in positions with source information; `unspelled` the
        share of bytes that the source does not spell, if there are any.
        """
        own, aligned = (n / max(self.bytes, 1) / math.log(2) for n in (self.own_nats, self.aligned_nats))
        return {
            "own_bits_per_byte": own,
            "aligned_bits_per_byte": aligned,
            "fidelity": aligned / own if own else 1.0,
            "coverage": self.informed / max(self.tokens, 1),
            "mass_lost": self.tail / max(self.informed, 1),
            **({"unspelled": self.unspelled / self.bytes} if self.unspelled else {}),
        }


def judge_fidelity(
    own_bits_informed: float, fidelity: float, candidates_spelled: float = 1.0, conditional: float | None = None
) -> str:
    """Return the first of `VERDICTS` whose bounds hold.

    `candidates_spelled` is the share of the source's own candidates whose bytes are right (decoding_check.py); it has
    to reach what the share of bits does, for what is learned of the others goes to wrong tokens. `conditional` is the
    conditional fidelity (conditionals.py), None where it is not known; a low one alone makes nothing unusable, for it
    is that of the worst class of tokens.
    """
    share = min(own_bits_informed, candidates_spelled)
    certain = 1.0 if conditional is None else conditional
    return next(
        word
        for word, (least, most, worst) in VERDICTS.items()
        if share >= least and fidelity <= most and certain >= worst
    )
