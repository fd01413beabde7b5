"""Sum what the counts of a fused store say of each domain, window by window."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.models.segmentation import compute_bits_per_byte
from fuselm.stores.rows import Trace


@dataclass(slots=True)
class FusedSums:
    """Sum over fused documents, by domain; `lacking` counts by source the documents that only others have."""

    lacking: list[int]
    weights: dict[str, Float[ndarray, "sources"]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)  # of tokens that a source informs of
    nats: dict[str, float] = field(default_factory=dict)

    def add(self, domain: str, trace: Trace) -> None:
        """Add a document."""
        informed = trace.distributions.informed
        self._add(
            domain,
            trace.weights.sum(axis=0, dtype=float),
            len(trace.tokens),
            int(trace.lengths[informed].sum()),
            -float(trace.distributions.gold.sum(dtype=float)),
        )

    def _add(self, domain: str, weights: Float[ndarray, "sources"], tokens: int, size: int, nats: float) -> None:
        self.weights[domain] = self.weights.get(domain, 0.0) + weights
        self.tokens[domain] = self.tokens.get(domain, 0) + tokens
        self.bytes[domain] = self.bytes.get(domain, 0) + size
        self.nats[domain] = self.nats.get(domain, 0.0) + nats

    def as_row(self) -> dict[str, Any]:
        """Return the sums as JSON has them."""
        rows = {d: [w.tolist(), self.tokens[d], self.bytes[d], self.nats[d]] for d, w in self.weights.items()}
        return {"lacking": self.lacking, "domains": rows}

    def summarize(self) -> dict[str, dict[str, Any]]:
        """Return each source's mean weight, and the bits per byte of what was fused, by domain."""
        return {
            "shares": {d: (sums / max(self.tokens[d], 1)).tolist() for d, sums in self.weights.items()},
            "bits_per_byte": {d: compute_bits_per_byte(self.nats[d], self.bytes[d]) for d in self.nats},
        }


def add_up(sources: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> FusedSums:
    """Add up the sums of windows, in their order."""
    total = FusedSums([0] * len(sources))
    for row in rows:
        total.lacking = [a + b for a, b in zip(total.lacking, row["lacking"], strict=True)]
        for domain, (weights, *others) in row["domains"].items():
            total._add(domain, np.array(weights), *others)
    return total
