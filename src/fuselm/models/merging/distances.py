"""Measure how far models are apart: lengths of their differences, angles between those, and how far signs agree."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.models.merging.blocks import CHUNK, Models


@dataclass(slots=True, kw_only=True)
class Distances:
    """Add up what is known of the tensors of some layer, block by block; the first model of a block is the base."""

    parameters: int = 0
    base: float = 0.0  # the squared length of the base
    products: Float[Tensor, "models models"] | None = None  # of the differences, in float64
    same_signs: dict[tuple[int, int], int] = field(default_factory=dict)  # by the numbers of two models
    moved: dict[tuple[int, int], int] = field(default_factory=dict)  # elements that both changed

    def add(self, blocks: Iterable[Models]) -> None:
        """Add blocks of a tensor."""
        for models in blocks:
            for parts in zip(*(model.flatten().split(CHUNK) for model in models), strict=True):
                self._add_chunk(torch.stack(parts).double())

    def _add_chunk(self, wide: Float[Tensor, "models elements"]) -> None:
        self.parameters += wide.shape[1]
        self.base += float(wide[0] @ wide[0])
        moved = wide[1:] - wide[0]
        products = moved @ moved.T
        self.products = products if self.products is None else self.products + products
        signs = moved.sign()
        for a, b in itertools.combinations(range(len(moved)), 2):
            product = signs[a] * signs[b]
            self.same_signs[a, b] = self.same_signs.get((a, b), 0) + int((product > 0).sum())
            self.moved[a, b] = self.moved.get((a, b), 0) + int(torch.count_nonzero(product))

    @property
    def relative_lengths(self) -> list[float | None]:
        """Return the length of each model's difference over that of the base; None where the base has none."""
        if self.products is None or not self.base:
            return [] if self.products is None else [None] * len(self.products)
        return (self.products.diagonal() / self.base).sqrt().tolist()

    def compute_cosine(self, a: int, b: int) -> float | None:
        """Return the cosine between the differences of two models; None where one has not moved."""
        assert self.products is not None
        lengths = float((self.products[a, a] * self.products[b, b]).sqrt())
        return float(self.products[a, b]) / lengths if lengths else None

    def compute_agreement(self, a: int, b: int) -> float | None:
        """Return the share of elements with the same sign among those that both changed; None without any."""
        return self.same_signs[a, b] / self.moved[a, b] if self.moved.get((a, b)) else None
