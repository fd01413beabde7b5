"""Merge models as a base and their differences from it: added, trimmed, dropped at random, or as far as they agree."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.models.merging.blocks import Blocks, Merge, Models, add_agreeing, combine, differences, kth_largest

LEAST_SUM = 1e-8  # sums of weights below this do not normalise


def linear(blocks: Blocks, *, weight: Sequence[float], normalize: bool = True) -> Merge:
    """Return the weighted mean (arXiv 2203.05482), or the weighted sum without `normalize`.

    Raises `ValueError` if the weights sum to 0 and are to be normalised.
    """
    total = sum(weight) if normalize else 1.0
    if abs(total) < LEAST_SUM:
        raise ValueError("linear: the weights sum to 0; change one, or set normalize: false")
    return combine([share / total for share in weight])


def task_arithmetic(blocks: Blocks, *, weight: Sequence[float], normalize: bool = False, scale: float = 1.0) -> Merge:
    """Add weighted differences to the base (arXiv 2212.04089)."""
    return lambda models: models[0] + scale * _add_up(differences(models), weight, normalize)


def ties(
    blocks: Blocks, *, weight: Sequence[float], density: Sequence[float], normalize: bool = True, scale: float = 1.0
) -> Merge:
    """Trim differences to their largest elements, elect a sign for each element, and add those that agree.

    Yadav et al. 2023, arXiv 2306.01708. `density` is the share of elements of each difference that is kept, at least
    one. Elements as large as the smallest that is kept are kept too.
    """
    size = sum(models[0].numel() for models in blocks())
    least = [
        0.0
        if share >= 1
        else torch.inf
        if share <= 0
        else kth_largest(
            lambda n=n: ((models[n + 1] - models[0]).abs() for models in blocks()), max(1, int(share * size))
        )
        for n, share in enumerate(density)
    ]

    def merge(models: Models) -> Float[Tensor, "*rows"]:
        trimmed = [d * (d.abs() >= own) for d, own in zip(differences(models), least, strict=True)]
        return models[0] + scale * add_agreeing(trimmed, weight, normalize=normalize)

    return merge


def dare(
    blocks: Blocks,
    *,
    elects_sign: bool,
    weight: Sequence[float],
    density: Sequence[float],
    rescale: str | bool = True,
    normalize: bool = False,
    scale: float = 1.0,
    generators: Sequence[torch.Generator],
) -> Merge:
    """Drop elements of the differences at random, rescale the rest, and add them (arXiv 2311.03099).

    With `elects_sign` only those are added that agree with the elected sign, as `ties` does. `rescale` is "density" for
    the paper's 1/density; true or "l1" keeps the sum of absolute values of each difference; false does neither. Each
    model's elements are drawn by a generator of its own.
    """
    drop = _Dropping(blocks, density, rescale, generators)
    add = partial(add_agreeing if elects_sign else _add_up, weight=weight, normalize=normalize)
    return lambda models: models[0] + scale * add(drop(models))


class _Dropping:
    """Drop elements of differences at random, block after block, the same ones in every pass."""

    def __init__(
        self, blocks: Blocks, density: Sequence[float], rescale: str | bool, generators: Sequence[torch.Generator]
    ):
        self._density, self._generators = density, generators
        self._factors = [1 / share if rescale == "density" and 0 < share < 1 else 1.0 for share in density]
        if rescale in (True, "l1") and min(density) < 1:
            starts = [generator.get_state() for generator in generators]
            before, after = torch.zeros(len(density)).double(), torch.zeros(len(density)).double()
            for models in blocks():
                before += torch.stack([d.abs().double().sum() for d in differences(models)])
                after += torch.stack([d.abs().double().sum() for d in self(models)])
            self._factors = [float(b / a) if min(a, b) >= 1e-7 else 1.0 for b, a in zip(before, after, strict=True)]
            for generator, start in zip(generators, starts, strict=True):
                generator.set_state(start)

    def __call__(self, models: Models) -> list[Float[Tensor, "*rows"]]:
        return [
            d if share >= 1 else d * torch.bernoulli(torch.full_like(d, share), generator=generator) * factor
            for d, share, generator, factor in zip(
                differences(models), self._density, self._generators, self._factors, strict=True
            )
        ]


def _add_up(parts: Models, weight: Sequence[float], normalize: bool) -> Float[Tensor, "*rows"]:
    total = sum(weight)
    return combine(weight)(parts) / (total if normalize and abs(total) >= LEAST_SUM else 1.0)
