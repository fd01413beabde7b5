"""Find a model's layers, and take some of them away."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fuselm.models.pruning.configs import read_size, resize_config
from fuselm.models.pruning.shapes import read_shapes


def find_layer_prefix(config: PreTrainedConfig) -> str:
    """Return what the names of layers' tensors begin with, before the layer's number.

    Raises `ValueError` if layers cannot be told from the tensors of a model with one layer less.
    """
    layers = read_size(config, "layers")
    if layers is None or layers < 2:
        raise ValueError(f"{config.model_type}: has no two layers to choose from")
    names = read_shapes(config).keys()
    gone = names - read_shapes(resize_config(config, {"layers": layers - 1})).keys()
    prefixes = {name.partition(f".{layers - 1}.")[0] for name in gone}
    if len(prefixes) != 1 or any(f".{layers - 1}." not in name for name in gone):
        raise ValueError(f"{config.model_type}: its layers are not numbered one after the other")
    return prefixes.pop() + "."


def find_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the modules of a model's layers, in order."""
    layers = model.get_submodule(find_layer_prefix(model.config).rstrip("."))
    return list(layers.children())


def read_layer_number(name: str, prefix: str) -> int | None:
    """Return the layer that a tensor belongs to, if any."""
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def keep_layers(tensors: Mapping[str, Tensor], prefix: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors of the kept layers, numbered anew, and those that belong to no layer."""
    places = {layer: n for n, layer in enumerate(kept)}
    result = {}
    for name, tensor in tensors.items():
        layer = read_layer_number(name, prefix)
        if layer is None:
            result[name] = tensor
        elif layer in places:
            rest = name.removeprefix(prefix).partition(".")[2]
            result[f"{prefix}{places[layer]}.{rest}"] = tensor
    return result
