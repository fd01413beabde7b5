"""Merge tensors along great circles: what counts is their direction, and their length apart from it.

What these methods return lies in the span of the tensors, so its coefficients follow from their inner products.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.models.merging.blocks import Blocks, Merge, Models, combine, differences, gram

PARALLEL = 0.9995  # cosine beyond which slerp interpolates linearly
SMALL = 1e-8  # a vector no longer than this has no direction


def slerp(blocks: Blocks, *, t: float) -> Merge:
    """Interpolate from the first tensor (t = 0) to the second (t = 1) along the great circle through both."""
    return combine(_arc(gram(blocks), t, lambda cosine: abs(cosine) > PARALLEL))


def nuslerp(
    blocks: Blocks,
    *,
    has_base: bool,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Merge:
    """Interpolate spherically by weights: whole tensors, else rows or columns; their differences if there is a base.

    Without `nuslerp_flatten`, the last axis holds the vectors, or with `nuslerp_row_wise` the first.
    """
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if nuslerp_flatten:
        a, b = _arc(gram(blocks, from_first=has_base), t, lambda cosine: 1 - cosine**2 <= 1e-16)
        return combine([1 - a - b, a, b] if has_base else [a, b])
    products: Tensor | None = None
    if nuslerp_row_wise:
        for models in blocks():
            x, y = differences(models) if has_base else models
            sums = torch.stack([(x * x).double().sum(0), (y * y).double().sum(0), (x * y).double().sum(0)])
            products = sums if products is None else products + sums

    def merge(models: Models) -> Float[Tensor, "*rows"]:
        x, y = differences(models) if has_base else models
        if products is not None:
            shares = _arcs(*products, t)
        else:
            shares = _arcs(*((p * q).double().sum(-1, keepdim=True) for p, q in ((x, x), (y, y), (x, y))), t)
        mixed = shares[0] * x + shares[1] * y
        return models[0] + mixed if has_base else mixed

    return merge


def _arc(products: Float[Tensor, "2 2"], t: float, is_straight) -> list[float]:
    """Return the shares of two vectors in the one at `t` on the arc between them; linear ones if it is straight."""
    lengths = [math.sqrt(float(products[n, n])) for n in (0, 1)]
    cosine = float(products[0, 1]) / math.prod(length if length > SMALL else 1.0 for length in lengths)
    cosine = min(max(cosine, -1.0), 1.0)
    if is_straight(cosine):
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _arcs(
    xx: Float[Tensor, "*n"], yy: Float[Tensor, "*n"], xy: Float[Tensor, "*n"], t: float
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Return the shares of many pairs of vectors, from the sums of their squares and products."""
    lengths = xx.sqrt().clamp(min=1e-7) * yy.sqrt().clamp(min=1e-7)
    cosine = (xy / lengths).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(straight, 0, cosine))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    second = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return first.float(), second.float()


def karcher(blocks: Blocks, *, max_iter: int = 10, tol: float = 1e-5) -> Merge:
    """Return the mean direction on the sphere (arXiv 2603.04972), as long as the tensors are in the mean.

    The mean is moved `max_iter` times at most along the mean of the logarithms there, until a step is below `tol`.
    """
    products = gram(blocks)
    lengths = products.diagonal().sqrt()
    has_direction = lengths > tol
    if not has_direction.any():
        return combine([0.0] * len(lengths))
    scale = torch.where(has_direction, lengths, torch.ones_like(lengths))
    cosines = products / scale[:, None] / scale[None]  # of unit vectors u_i; the mean is sum_i mean_i u_i
    share = has_direction.double() / has_direction.sum()

    def length_of(vector: Tensor) -> float:
        return math.sqrt(max(float(vector @ cosines @ vector), 0.0))

    mean = share.clone()
    if length_of(mean) < tol:
        mean = torch.zeros_like(share)
        mean[int(has_direction.nonzero()[0])] = 1.0
    mean /= length_of(mean)
    for _ in range(max_iter):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle = torch.acos(cosine)
        pull = torch.where(has_direction & (angle >= tol), share * angle / torch.sin(angle), 0.0)
        step = pull - (pull * cosine).sum() * mean
        length = length_of(step)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean /= length_of(mean)
    return combine((mean / scale * float(lengths.mean())).tolist())
