"""How much of a source survives its alignment. DESIGN.md section 4.

Fidelity is the bits that the aligned distributions give to a text over the bits that the source itself gives to it:
1 is perfect. It says little where coverage is below 1: a target position without information counts 0 bits, for the
paper's fallback there is one-hot on the gold token. So `verdict` goes by the share of the source's bits that lie in
spans with information, and by the fidelity within those (spans.py).
"""

import math
from dataclasses import dataclass

import numpy as np

from fuselm.store import Trace

# The least share of the source's bits in informed spans, and the largest fidelity there.
VERDICTS = {"usable": (0.95, 1.05), "partly usable": (0.5, 1.25), "not usable": (0.0, math.inf)}


@dataclass(slots=True, kw_only=True)
class Fidelity:
    """Sums over documents; `add` takes a trace and what alignment made of it."""

    bytes: int = 0
    tokens: int = 0
    own_nats: float = 0.0
    aligned_nats: float = 0.0
    informed: int = 0
    tail: float = 0.0  # of rows with information

    def add(self, source: Trace, aligned: Trace) -> None:
        d = aligned.distributions
        self.bytes += source.size
        self.tokens += len(d)
        self.own_nats -= float(source.distributions.gold.astype(np.float64).sum())  # `nats` but for rounding
        self.aligned_nats -= float(d.gold.astype(np.float64).sum())
        self.informed += int(d.informed.sum())
        self.tail += float(d.tail[d.informed].astype(np.float64).sum())

    def summary(self) -> dict[str, float]:
        """`mass_lost` is the mean mass that reached no target id, in positions with source information."""
        own, aligned = (n / max(self.bytes, 1) / math.log(2) for n in (self.own_nats, self.aligned_nats))
        return {
            "own_bits_per_byte": own,
            "aligned_bits_per_byte": aligned,
            "fidelity": aligned / own if own else 1.0,
            "coverage": self.informed / max(self.tokens, 1),
            "mass_lost": self.tail / max(self.informed, 1),
        }


def verdict(own_bits_informed: float, fidelity: float) -> str:
    """The first of `VERDICTS` whose bounds hold."""
    return next(word for word, (least, most) in VERDICTS.items() if own_bits_informed >= least and fidelity <= most)
