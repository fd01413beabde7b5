"""Measure how sensitive layers are: how far the loss rises if one of them alone loses what is to be removed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models.pruning.coupling import Coupling, Place, Slices
from fuselm.models.pruning.gradients import Sample, compute_loss
from fuselm.models.pruning.layers import find_layers
from fuselm.system.errors import name_model_errors

Kept = Mapping[str, Mapping[Place, Int[Tensor, "_"]]]  # units that stay, by structure and place


def measure_rises(
    model: PreTrainedModel,
    couplings: Sequence[Coupling],
    kept: Kept,
    samples: Sequence[Sample],
    *,
    with_layers: bool,
    advance: Callable[[int], object],
) -> dict[str, dict[int, float]]:
    """Return by how many bits for each token the loss rises, by structure and layer.

    For `mlp` and `groups`, the layer loses the units that are not in `kept`; for `layers`, it is skipped. The model is
    left as it was. `advance` is told how many tokens were read.
    """
    whole = _measure_loss(model, samples, advance)
    rises: dict[str, dict[int, float]] = {}
    for coupling in couplings:
        if coupling.structure == "hidden":
            continue  # it belongs to no layer
        for layer in sorted({place[0] for place in coupling.slices}):
            with _silence_units(model, coupling, kept[coupling.structure], layer):
                rise = _measure_loss(model, samples, advance) - whole
            rises.setdefault(coupling.structure, {})[layer] = rise
    for layer, module in enumerate(find_layers(model) if with_layers else ()):
        with _skip(module):
            rises.setdefault("layers", {})[layer] = _measure_loss(model, samples, advance) - whole
    return rises


def count_passes(couplings: Sequence[Coupling], layers: int | None) -> int:
    """Return how often `measure_rises` reads the samples; `layers` are those that it skips."""
    of_units = sum(len({place[0] for place in c.slices}) for c in couplings if c.structure != "hidden")
    return 1 + of_units + (layers or 0)


def _measure_loss(model: PreTrainedModel, samples: Sequence[Sample], advance: Callable[[int], object]) -> float:
    total = 0.0
    with torch.inference_mode(), name_model_errors(model.name_or_path, "measuring sensitivity"):
        for sample in samples:
            total += float(compute_loss(model, sample))
            advance(len(sample) - 1)
    return total / len(samples) / math.log(2)


@contextmanager
def _silence_units(
    model: PreTrainedModel, coupling: Coupling, kept: Mapping[Place, Int[Tensor, "_"]], layer: int
) -> Iterator[None]:
    """Set the weights of a layer's removed units to zero within the `with` block: so they put out nothing."""
    found = [(place, own) for place, slices in coupling.slices.items() if place[0] == layer for own in slices]
    before = {own.tensor: model.get_parameter(own.tensor).detach().clone() for _, own in found}
    try:
        with torch.no_grad():
            for place, own in found:
                _zero_units(model.get_parameter(own.tensor), own, kept[place], coupling.units)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                model.get_parameter(name).copy_(tensor)


def _zero_units(parameter: Tensor, slices: Slices, kept: Int[Tensor, "_"], units: int) -> None:
    stays = torch.zeros(units, dtype=torch.bool)
    stays[kept] = True
    item, axis = parameter, slices.axis
    if slices.expert is not None:
        item, axis = parameter[slices.expert], axis - 1
    gone = slices.index((~stays).nonzero()[:, 0], units)
    fixed = slices.index(torch.zeros(0, dtype=torch.long), units)  # entries that belong to no unit
    gone = gone[~torch.isin(gone, fixed)]
    item.index_fill_(axis, gone.to(parameter.device), 0.0)


@contextmanager
def _skip(layer: torch.nn.Module) -> Iterator[None]:
    """Let a layer return what it reads within the `with` block."""

    def hook(_: torch.nn.Module, arguments: tuple, keywords: dict, output: Tensor | tuple) -> Tensor | tuple:
        read = arguments[0] if arguments else keywords["hidden_states"]
        return (read, *output[1:]) if isinstance(output, tuple) else read

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
