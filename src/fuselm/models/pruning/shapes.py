"""Read from transformers itself how the shapes of a model's tensors depend on its sizes.

Models are built on the meta device, which has no memory, with one size changed at a time. So no list of architectures
is needed: whatever `AutoModelForCausalLM` builds can be asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fuselm.models.pruning.configs import count_heads, read_size, resize_config
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_library_output

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Describe an axis that grows with a size: it is `per_unit` * units + `fixed` long."""

    tensor: str
    axis: int
    per_unit: int
    fixed: int
    experts: int | None = None  # of a tensor that holds one matrix for each, on axis 0


def read_shapes(config: PreTrainedConfig) -> Shapes:
    """Return the shape of each parameter of a model; tied parameters are there once.

    Raises `ValueError`, one line, if transformers cannot build it.
    """
    try:
        with torch.device("meta"), hide_library_output():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's class may raise anything on a configuration
        raise ValueError(f"{config.model_type}: transformers cannot build it ({summarize_error(error)})") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def count_parameters(shapes: Shapes) -> int:
    """Count the numbers of all parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def find_axes(config: PreTrainedConfig, structure: str) -> list[Axis]:
    """Return the axes whose length depends on a size. It is empty if none does.

    Raises `ValueError` if the configuration does not name the size, or transformers builds the model with no other.
    """
    units = read_size(config, structure)
    if units is None:
        raise ValueError(f"{config.model_type}: config.json has no one number for {structure}")
    shapes = read_shapes(config)
    tried: dict[int, Shapes] = {}
    reason: Exception | None = None
    for other in _list_other_sizes(config, structure, units):
        try:
            found = read_shapes(resize_config(config, {structure: other}))
        except Exception as error:  # a configuration's class may raise anything on sizes that it does not take
            reason = error
            continue
        if found.keys() == shapes.keys():
            tried[other] = found
        if len(tried) == 2:
            break
    if not tried:
        said = "" if reason is None else f" ({summarize_error(reason)})"
        raise ValueError(f"{config.model_type}: transformers builds no such model with other {structure}{said}")
    return list(_compare(shapes, units, tried, config.model_type, structure))


def _compare(shapes: Shapes, units: int, tried: dict[int, Shapes], model_type: str, structure: str) -> Iterator[Axis]:
    for name, shape in shapes.items():
        for axis, length in enumerate(shape):
            slopes = {
                (length - others[name][axis]) / (units - other) if len(others[name]) == len(shape) else None
                for other, others in tried.items()
            }
            if slopes == {0}:
                continue
            slope = slopes.pop()
            if slopes or slope is None or slope != int(slope) or slope < 0:
                raise ValueError(f"{model_type}: {name} does not grow evenly with {structure}")
            yield Axis(
                tensor=name,
                axis=axis,
                per_unit=int(slope),
                fixed=length - int(slope) * units,
                experts=_count_experts(shapes, name) if axis > 0 else None,
            )


def _count_experts(shapes: Shapes, name: str) -> int | None:
    """Return how many experts a tensor holds on axis 0: one of three axes does, and a bias in the same module."""
    module, length = name.rpartition(".")[0], shapes[name][0]
    beside = [shape for other, shape in shapes.items() if other.rpartition(".")[0] == module]
    return length if any(len(shape) == 3 and shape[0] == length for shape in beside) else None


def _list_other_sizes(config: PreTrainedConfig, structure: str, units: int) -> Iterator[int]:
    if structure == "groups":
        yield from (n for n in (*range(units - 1, 0, -1), *range(units + 1, 4 * units + 1)))
    elif structure == "hidden":  # some classes need a multiple of the number of heads
        step = count_heads(config)
        yield from (units + step, units + 2 * step, units + 4 * step)
    else:
        yield from (n for n in (units - 1, units + 1, units - 2, 2 * units, 3 * units) if n > 0)
