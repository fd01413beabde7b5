"""Merge tensors by a method's name. `choices` says what each method needs and takes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.models.merging.blocks import Blocks, Merge
from fuselm.models.merging.choices import METHODS, REQUIRED, Method
from fuselm.models.merging.differences import dare, linear, task_arithmetic, ties
from fuselm.models.merging.scores import model_stock, sce, varm, widen
from fuselm.models.merging.spherical import karcher, nuslerp, slerp

FUNCTIONS: dict[str, Callable[..., Merge]] = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "karcher": karcher,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": partial(dare, elects_sign=False),
    "dare_ties": partial(dare, elects_sign=True),
    "model_stock": model_stock,
    "sce": sce,
    "varm": varm,
    "widen": widen,
}


def begin_merge(
    method: str,
    blocks: Blocks,
    *,
    parameters: Mapping[str, Any],
    has_base: bool,
    seed: int = 0,
    is_embedding: bool = False,
) -> Merge:
    """Pass over a tensor's blocks as often as the method needs, and return the function that merges each block.

    `parameters` has everything that the method takes. Blocks hold the base first if there is one. `seed` decides which
    elements DARE drops.
    """
    described, told = METHODS[method], dict(parameters)
    if described.draws:
        count = len(parameters["weight"])
        told["generators"] = [torch.Generator().manual_seed(seed * 1009 + number) for number in range(count)]
    if described.tells_embeddings:
        told["by_row"] = is_embedding
    if described.tells_base:
        told["has_base"] = has_base
    return FUNCTIONS[method](blocks, **told)


def merge_tensors(
    method: str,
    tensors: Sequence[Float[Tensor, "*shape"]],
    *,
    base: Float[Tensor, "*shape"] | None = None,
    seed: int = 0,
    is_embedding: bool = False,
    **parameters: Any,
) -> Float[Tensor, "*shape"]:
    """Merge tensors of one shape by a method's name, with its own parameters; the others have their defaults.

    The work is done in float32. Raises `ValueError` if the method needs a base, more models, or another parameter.

    >>> import torch
    >>> fuselm.merge_tensors("task_arithmetic", [torch.ones(2), -torch.ones(2)], base=torch.zeros(2), weight=[1, 0.5])
    tensor([0.5000, 0.5000])
    """
    described = METHODS[method]
    if described.base == "needed" and base is None:
        raise ValueError(f"{method}: needs a base; give one")
    if not described.least <= len(tensors) <= described.most:
        raise ValueError(f"{method}: merges {_count(described)} (got {len(tensors)})")
    defaults = {name: [value] * len(tensors) for name, value in described.per_model.items() if value is not REQUIRED}
    defaults |= {name: value for name, value in described.shared.items() if value is not REQUIRED}
    known = {*described.per_model, *described.shared}
    if wrong := sorted(set(parameters) - known) or sorted(known - set(defaults) - set(parameters)):
        raise ValueError(f"{method}: takes {', '.join(sorted(known)) or 'no parameters'}; check {', '.join(wrong)}")
    parameters |= {name: list(map(float, parameters[name])) for name in described.per_model if name in parameters}
    has_base = base is not None and described.base != "unused"
    models = [t.float() for t in ([base, *tensors] if has_base else tensors)]
    flat = [m.reshape(1) if m.dim() == 0 else m for m in models]
    merge = begin_merge(
        method,
        lambda: [flat],
        parameters=defaults | parameters,
        has_base=has_base,
        seed=seed,
        is_embedding=is_embedding,
    )
    return merge(flat).reshape(tensors[0].shape)


def _count(described: Method) -> str:
    if described.most == described.least:
        return f"exactly {described.least} model{'s' * (described.least != 1)} besides a base"
    return f"at least {described.least} model{'s' * (described.least != 1)} besides a base"
