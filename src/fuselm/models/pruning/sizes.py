"""Choose the sizes of the smaller model: those that come nearest to a number of parameters."""

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig

from fuselm.models.pruning.configs import count_heads, read_size, resize_config
from fuselm.models.pruning.shapes import count_parameters, read_shapes

STEPS = 1024  # shares of a size that are told apart
LEAST_GRAIN = 8  # of a hidden width that no multiple of the wanted number fits


def solve_sizes(
    config: PreTrainedConfig, structures: Sequence[str], parameters: int, *, multiple: int
) -> dict[str, int]:
    """Return the sizes that come nearest to a number of parameters, cutting all structures by about the same share.

    Widths are multiples of `multiple`. Where the configuration's class takes no such hidden width, because it needs a
    multiple of the number of heads, the width is one that is also a multiple of 8.

    Raises `ValueError` if these structures cannot make the model so small.
    """
    whole = {structure: read_size(config, structure) or 0 for structure in structures}
    candidates: dict[tuple[int, ...], dict[str, int]] = {}
    for step in range(STEPS + 1):
        sizes = _cut(config, whole, step / STEPS, multiple)
        if sizes is not None:
            candidates.setdefault(tuple(sizes.values()), sizes)
    ordered = list(candidates.values())  # from small to large, and so are their numbers of parameters
    counted: dict[int, int] = {}

    def count(n: int) -> int:
        if n not in counted:
            counted[n] = count_with_sizes(config, ordered[n])
        return counted[n]

    if parameters < count(0):
        raise ValueError(
            f"{parameters:,} parameters: with as little of {' and '.join(structures)} as can be, {count(0):,} are "
            "left; ask for more, or name another structure"
        )
    low, high = 0, len(ordered) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return ordered[min((low, high), key=lambda n: abs(count(n) - parameters))]


def count_with_sizes(config: PreTrainedConfig, sizes: Mapping[str, int]) -> int:
    """Return the parameters of a model with these sizes."""
    return count_parameters(read_shapes(resize_config(config, sizes)))


def _cut(config: PreTrainedConfig, whole: Mapping[str, int], share: float, multiple: int) -> dict[str, int] | None:
    """Return sizes cut to a share; None if the configuration's class takes nothing near it."""
    grains = {"mlp": multiple, "hidden": multiple}
    sizes = {name: _round_size(size, share, grains.get(name, 1)) for name, size in whole.items()}
    if _is_taken(config, sizes):
        return sizes
    if "hidden" in whole:
        heads = count_heads(config)
        if "groups" in whole:
            heads = heads // whole["groups"] * sizes["groups"]
        sizes["hidden"] = _round_size(whole["hidden"], share, math.lcm(heads, LEAST_GRAIN))
    return sizes if _is_taken(config, sizes) else None


def _round_size(size: int, share: float, grain: int) -> int:
    return size if share == 1 or size < grain else max(grain, grain * round(size * share / grain))


def _is_taken(config: PreTrainedConfig, sizes: Mapping[str, int]) -> bool:
    try:
        resize_config(config, sizes)
    except Exception:  # a configuration's class may raise anything on sizes that it does not take
        return False
    return True
