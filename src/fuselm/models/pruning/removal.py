"""Make the smaller model: slice the tensors, and put them into a model of the smaller configuration."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fuselm.models.pruning.configs import read_size, resize_config
from fuselm.models.pruning.coupling import Coupling, Place
from fuselm.models.pruning.layers import find_layer_prefix, keep_layers
from fuselm.system.library_output import hide_library_output


def remove_units(
    model: PreTrainedModel,
    couplings: Sequence[Coupling],
    kept: Mapping[str, Mapping[Place, Int[Tensor, "kept"]]],
    kept_layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Return a model with the kept units of each structure and the kept layers alone; `model` stays as it is.

    Weights that stay keep their bits and their type.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied ones are there once
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tensors.keys()
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in tensors.keys() | aliases}
    sizes: dict[str, int] = {}
    for coupling in couplings:
        chosen = kept[coupling.structure]
        tensors = coupling.select(tensors, chosen)
        sizes[coupling.structure] = len(next(iter(chosen.values())))
    layers = read_size(model.config, "layers")
    if kept_layers is not None and len(kept_layers) != layers:
        tensors = keep_layers(tensors, find_layer_prefix(model.config), kept_layers)
        sizes["layers"] = len(kept_layers)
    config = resize_config(model.config, sizes, kept_layers)
    with hide_library_output(), torch.random.fork_rng(devices=[]):
        smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    left = smaller.load_state_dict(tensors, assign=True, strict=False)
    assert not left.unexpected_keys and len(left.missing_keys) == len(aliases), left
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller.to(model.device).eval()
