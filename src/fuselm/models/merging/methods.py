"""Name the merging methods, with what each needs and the parameters that it takes; merge tensors by one of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.models.merging.blocks import Blocks, Merge
from fuselm.models.merging.differences import dare_linear, dare_ties, linear, task_arithmetic, ties
from fuselm.models.merging.scores import model_stock, sce, varm, widen
from fuselm.models.merging.spherical import karcher, nuslerp, slerp

REQUIRED = object()  # the default of a parameter that must be given


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Describe a merging method: its function, what it needs, and its parameters with their defaults.

    `per_model` parameters have a value for each model that is not the base. `choices` are the values that a parameter
    may have where its type does not tell.
    """

    function: Callable[..., Merge]
    base: Literal["needed", "optional", "unused"]
    least: int = 1  # models besides the base
    most: float | int = math.inf
    per_model: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence] = field(default_factory=dict)
    draws: bool = False  # takes `generators`, one for each model
    tells_embeddings: bool = False  # takes `by_row`, which is true for embeddings
    tells_base: bool = False  # takes `has_base`


_SPARSE = dict(weight=REQUIRED, density=1.0)
_DARE = dict(
    base="needed",
    per_model=_SPARSE,
    shared=dict(rescale=True, normalize=False, scale=1.0),
    choices=dict(rescale=(True, False, "l1", "density")),
    draws=True,
)
METHODS: dict[str, Method] = {
    "linear": Method(function=linear, base="unused", per_model=dict(weight=REQUIRED), shared=dict(normalize=True)),
    "slerp": Method(function=slerp, base="needed", most=1, shared=dict(t=REQUIRED)),
    "nuslerp": Method(
        function=nuslerp,
        base="optional",
        least=2,
        most=2,
        per_model=dict(weight=REQUIRED),
        shared=dict(nuslerp_flatten=True, nuslerp_row_wise=False),
        tells_base=True,
    ),
    "karcher": Method(function=karcher, base="unused", shared=dict(max_iter=10, tol=1e-5)),
    "task_arithmetic": Method(
        function=task_arithmetic,
        base="needed",
        per_model=dict(weight=REQUIRED),
        shared=dict(normalize=False, scale=1.0),
    ),
    "ties": Method(function=ties, base="needed", per_model=_SPARSE, shared=dict(normalize=True, scale=1.0)),
    "dare_linear": Method(function=dare_linear, **_DARE),
    "dare_ties": Method(function=dare_ties, **_DARE),
    "model_stock": Method(function=model_stock, base="needed", least=2, shared=dict(filter_wise=False)),
    "sce": Method(
        function=sce,
        base="needed",
        shared=dict(select_topk=1.0, select="deltas"),
        choices=dict(select=("deltas", "weights_only")),
    ),
    "varm": Method(function=varm, base="needed"),
    "widen": Method(
        function=widen,
        base="needed",
        shared=dict(above_average_value_ratio=1.0, score_calibration_value=1.0),
        tells_embeddings=True,
    ),
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
    return described.function(blocks, **told)


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
