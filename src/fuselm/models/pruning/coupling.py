"""Say which slices of a model's tensors belong to one unit: an MLP channel, a key-value group, a hidden channel.

A unit can only be removed whole, with its slice of every tensor that is coupled. LLM-Pruner (Ma et al., NeurIPS 2023)
and torch-pruning follow the operations of a forward pass to find them. Here the shapes say which axes belong to a size,
and `twins` proves that their units are where this module takes them to be.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from fuselm.models.pruning import configs, shapes, twins
from fuselm.models.pruning.shapes import Axis

MOST_TRIALS = 4096  # layouts of fused projections that are tried, likeliest first
OBSTACLES = {
    "mlp": "the MLPs' width follows from another size in transformers, so no channel can be removed",
    "groups": "the size of a head follows from the hidden width in transformers, or heads are not interchangeable, so "
    "no head can be removed",
    "hidden": "the size of a head follows from the hidden width in transformers, so no hidden channel can be removed",
}
Place = tuple[int, ...]  # layer, and expert if there are several; () for the hidden width, which all layers share


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Describe a stretch of an axis: `size` entries for each unit, one unit after the other; or `size` that stay."""

    size: int
    is_fixed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """Say where the units are on one axis of a tensor. With `expert`, only that item of axis 0 is meant."""

    tensor: str
    axis: int
    parts: tuple[Part, ...]
    expert: int | None = None

    def index(self, units: Int[Tensor, "kept"], count: int) -> Int[Tensor, "entries"]:
        """Return the axis's entries of these units, of `count` in all, and those that belong to no unit."""
        found, begin = [], 0
        for part in self.parts:
            if part.is_fixed:
                found.append(torch.arange(begin, begin + part.size))
                begin += part.size
            else:
                found.append((begin + units[:, None] * part.size + torch.arange(part.size)).flatten())
                begin += part.size * count
        return torch.cat(found)

    def sum_by_unit(self, values: Float[Tensor, "*rows entries"], count: int) -> Float[Tensor, "*rows units"]:
        """Add up an axis's values by unit."""
        total, begin = values.new_zeros(*values.shape[:-1], count), 0
        for part in self.parts:
            end = begin + part.size * (1 if part.is_fixed else count)
            if not part.is_fixed:
                total += values[..., begin:end].unflatten(-1, (count, part.size)).sum(dim=-1)
            begin = end
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """Hold the coupled slices of a structure, by place. Each place has `units`, which may be chosen by themselves."""

    structure: str
    units: int
    slices: Mapping[Place, Sequence[Slices]]

    def select(self, tensors: Mapping[str, Tensor], kept: Mapping[Place, Int[Tensor, "kept"]]) -> dict[str, Tensor]:
        """Return the tensors with the kept units alone, in the order in which `kept` has them."""
        result = dict(tensors)
        by_tensor: dict[tuple[str, int], list[tuple[Place, Slices]]] = {}
        for place, slices in self.slices.items():
            for own in slices:
                by_tensor.setdefault((own.tensor, own.axis), []).append((place, own))
        for (name, axis), found in by_tensor.items():
            tensor = result[name]
            if found[0][1].expert is None:
                (place, own), *_ = found
                result[name] = tensor.index_select(axis, own.index(kept[place], self.units).to(tensor.device))
            else:
                ordered = sorted(found, key=lambda item: item[1].expert or 0)
                result[name] = torch.stack(
                    [
                        tensor[own.expert].index_select(axis - 1, own.index(kept[place], self.units).to(tensor.device))
                        for place, own in ordered
                    ]
                )
        return result


def find_coupling(config: PreTrainedConfig, structure: str) -> Coupling:
    """Return the coupled slices of a structure: `mlp`, `groups` or `hidden`.

    Raises `ValueError`, one line, if the architecture cannot lose such units and stay an ordinary model.
    """
    axes = shapes.find_axes(config, structure)
    units = configs.read_size(config, structure)
    assert units is not None
    if not axes:
        raise ValueError(f"{config.model_type}: {OBSTACLES[structure]}")
    twin = twins.make_twin(config)
    small_axes, small_units = shapes.find_axes(twin.config, structure), configs.read_size(twin.config, structure)
    assert small_units is not None
    layouts = _list_layouts(config, structure, axes)
    for chosen in itertools.islice(itertools.product(*layouts.values()), MOST_TRIALS):
        parts = dict(zip(layouts, chosen, strict=True))
        small = Coupling(structure=structure, units=small_units, slices=_place_slices(small_axes, parts, structure))
        if twins.is_unmoved(twin, small):
            return Coupling(structure=structure, units=units, slices=_place_slices(axes, parts, structure))
    raise ValueError(
        f"{config.model_type}: {OBSTACLES[structure]} (the logits of a small copy of the model change when "
        "coupled units change places)"
    )


def _list_layouts(config: PreTrainedConfig, structure: str, axes: Sequence[Axis]) -> dict[str, list[list[Part]]]:
    """Return the ways in which units may lie on axes, likeliest first. Weight and bias of a module agree."""
    grain = configs.read_head_size(config) if structure == "groups" else 1
    layouts: dict[str, list[list[Part]]] = {}
    for axis in axes:
        layouts.setdefault(_name_pattern(axis), list(_iterate_layouts(axis, grain)))
    return layouts


def _iterate_layouts(axis: Axis, grain: int) -> Iterator[list[Part]]:
    """Yield how units may lie on an axis: fused projections hold several parts, unit by unit or one after the other."""
    whole = Part(size=axis.per_unit)
    fixed = [Part(size=axis.fixed, is_fixed=True)] if axis.fixed else []
    yield [whole, *fixed]
    if fixed:
        yield [*fixed, whole]
    size = axis.per_unit
    if size > grain and size % grain == 0:
        for parts in (2, 3):
            if size % (parts * grain) == 0:
                yield [*[Part(size=size // parts)] * parts, *fixed]
        if size > 3 * grain:  # queries of a group, then keys and values
            yield [Part(size=size - 2 * grain), Part(size=grain), Part(size=grain), *fixed]


def _name_pattern(axis: Axis) -> str:
    """Name what units' layout is shared by: a module's weight and bias, in all layers."""
    module = axis.tensor.rpartition(".")[0]
    return f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', module)} {axis.per_unit} {axis.fixed}"


def _place_slices(axes: Sequence[Axis], layouts: Mapping[str, list[Part]], structure: str) -> dict[Place, list[Slices]]:
    placed: dict[Place, list[Slices]] = {}
    for axis in axes:
        parts = tuple(layouts[_name_pattern(axis)])
        place = () if structure == "hidden" else tuple(int(part) for part in axis.tensor.split(".") if part.isdigit())
        if axis.experts is None or structure == "hidden":
            placed.setdefault(place, []).append(Slices(tensor=axis.tensor, axis=axis.axis, parts=parts))
            continue
        for expert in range(axis.experts):
            own = Slices(tensor=axis.tensor, axis=axis.axis, parts=parts, expert=expert)
            placed.setdefault((*place, expert), []).append(own)
    return placed
