"""Measure how much of a source survives its alignment.

Fidelity is the bits that the aligned distributions give to a text, divided by the bits that the source itself gives to
it: 1 is perfect. It says little where coverage is below 1, because a target position without information counts 0 bits:
the paper's fallback there is one-hot on the gold token. So `judge_fidelity` uses the share of the source's bits that
lie in spans with information, and the fidelity within those spans (span_losses.py). Fidelity says nothing about the
tokens that did not come; conditionals.py measures them.
"""

import math
from dataclasses import dataclass

import numpy as np

from fuselm.models.segmentation import BITS_PER_UNSPELLED_BYTE, compute_bits_per_byte
from fuselm.stores.store import Trace

# For each verdict: the least share of the source's bits in informed spans, the largest fidelity there, and the least
# conditional fidelity.
VERDICTS = {"usable": (0.95, 1.05, 0.9), "partly usable": (0.5, 1.25, 0.0), "not usable": (0.0, math.inf, 0.0)}


@dataclass(slots=True, kw_only=True)
class Fidelity:
    """Sum the fidelity of documents; `add` takes a trace and its aligned trace."""

    bytes: int = 0
    tokens: int = 0
    own_nats: float = 0.0
    aligned_nats: float = 0.0
    informed: int = 0
    tail: float = 0.0  # of rows with information
    unspelled: int = 0  # bytes

    def add(self, source: Trace, aligned: Trace, unspelled: int = 0) -> None:
        """Add a document that has `unspelled` bytes which the source does not spell."""
        d = aligned.distributions
        self.bytes += source.size
        self.tokens += len(d)
        self.own_nats -= float(source.distributions.gold.astype(np.float64).sum())  # equals `nats`, except for rounding
        self.own_nats += unspelled * BITS_PER_UNSPELLED_BYTE * math.log(2)
        self.unspelled += unspelled
        self.aligned_nats -= float(d.gold.astype(np.float64).sum())
        self.informed += int(d.informed.sum())
        self.tail += float(d.tail[d.informed].astype(np.float64).sum())

    def add_sums(self, other: "Fidelity") -> None:
        """Add the sums of other documents."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summarize(self) -> dict[str, float]:
        """Return bits per byte, fidelity, coverage and the mass lost, of all documents.

        `mass_lost` is the mean mass that reached no target id, over positions with source information. `unspelled` is
        the share of bytes that the source does not spell; it is absent if the source spells all bytes.
        """
        own, aligned = (compute_bits_per_byte(n, self.bytes) for n in (self.own_nats, self.aligned_nats))
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

    `candidates_spelled` is the share of the source's own candidates whose bytes are right (decoding_check.py). It has
    the same bound as the share of bits, because the other candidates teach wrong tokens. `conditional` is the
    conditional fidelity (conditionals.py), or None if it is not known. It cannot make a source unusable by itself,
    because it measures the worst class of tokens.
    """
    share = min(own_bits_informed, candidates_spelled)
    certain = 1.0 if conditional is None else conditional
    return next(
        word
        for word, (least, most, worst) in VERDICTS.items()
        if share >= least and fidelity <= most and certain >= worst
    )
