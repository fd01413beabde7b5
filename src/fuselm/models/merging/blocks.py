"""Compute what a merging method must know of whole tensors from blocks of their rows.

A tensor of a large model does not fit into memory several times. So a method first passes over blocks of all models for
its statistics (lengths, angles, thresholds, norms of columns), and returns a function that then merges block by block.
The result does not depend on the size of the blocks, up to rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Models = Sequence[Float[Tensor, "*rows"]]  # the same rows of a tensor of every model; the base, if any, is the first
Blocks = Callable[[], Iterable[Models]]  # a new pass over all blocks
Merge = Callable[[Models], Float[Tensor, "*rows"]]  # called once for each block, in order


CHUNK = 1 << 16  # elements that a core keeps near it, in float64, of some models
HELD = 1 << 25  # values that `kth_largest` holds; more are counted by their bits


def gram(blocks: Blocks, *, from_first: bool = False) -> Float[Tensor, "models models"]:
    """Return the inner products of the models' tensors, in float64; with `from_first` those of their differences."""
    total: Tensor | None = None
    for models in blocks():
        for parts in zip(*(model.flatten().split(CHUNK) for model in models), strict=True):
            wide = torch.stack(parts).double()
            if from_first:
                wide = wide[1:] - wide[0]
            total = wide @ wide.T if total is None else total.addmm_(wide, wide.T)
    if total is None:
        raise ValueError("no block of a tensor to merge")
    return total


def add_agreeing(
    parts: Models, weight: Sequence[float], *, normalize: bool, is_positive: Bool[Tensor, "*rows"] | None = None
) -> Float[Tensor, "*rows"]:
    """Add those elements of weighted parts whose sign is that of the sum, 0 counting as above it.

    With `normalize` an element is divided by the weights that were added there. `parts` are used up. `is_positive`
    elects the sign otherwise.
    """
    weighted = [part.mul_(share) for part, share in zip(parts, weight, strict=True)]
    if is_positive is None:
        is_positive = sum(weighted[1:], weighted[0].clone()) >= 0
    sign = is_positive.to(torch.float32).mul_(2).sub_(1)
    result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, share in zip(weighted, weight, strict=True):
        agreeing = part.mul_(sign).clamp_(min=0)
        result.add_(agreeing)
        if normalize:
            divisor.add_(agreeing.sign_(), alpha=share)
    result.mul_(sign)
    return result.div_(divisor.masked_fill_(divisor == 0, 1.0)) if normalize else result


def combine(weights: Sequence[float]) -> Merge:
    """Return the merge that adds the models up, each times its weight."""

    def merge(models: Models) -> Float[Tensor, "*rows"]:
        result = models[0] * weights[0]
        for model, weight in zip(models[1:], weights[1:], strict=True):
            result.add_(model, alpha=weight)
        return result

    return merge


def differences(models: Models) -> list[Float[Tensor, "*rows"]]:
    """Return how far each model is from the first."""
    return [model - models[0] for model in models[1:]]


def kth_largest(values: Callable[[], Iterator[Float[Tensor, "*rows"]]], count: int) -> float:
    """Return the `count`-th largest of non-negative float32 values, exactly.

    Of many values two passes count the bits, because those of non-negative floats are ordered as the floats are: the
    first pass counts the upper half, the second the lower half of those that share the upper half of the value sought.
    """
    held: list[Tensor] = []
    for block in values():
        held.append(block.float().flatten())
        if sum(map(len, held)) > HELD:
            break
    else:
        every = torch.cat(held).numpy()
        return float(np.partition(every, len(every) - count)[len(every) - count])
    del held
    above, upper = _find_bin(_count_bits(values, lambda bits: bits >> 16), count)
    lower = _find_bin(_count_bits(values, lambda bits: bits[bits >> 16 == upper] & 0xFFFF), count - above)[1]
    return float(torch.tensor([(upper << 16) | lower], dtype=torch.int32).view(torch.float32))


def _count_bits(values: Callable[[], Iterator[Tensor]], select: Callable[[Tensor], Tensor]) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for block in values():
        bits = block.float().flatten().contiguous().view(torch.int32)
        counts += torch.bincount(select(bits), minlength=1 << 16)
    return counts


def _find_bin(counts: Tensor, count: int) -> tuple[int, int]:
    """Return how many values lie in higher bins than the `count`-th largest, and its bin."""
    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, count))
    return int(at_least[place - 1]) if place else 0, len(counts) - 1 - place
