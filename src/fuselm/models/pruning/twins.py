"""Prove that coupled slices are found rightly: whoever swaps units in all of them must leave the logits as they are.

A twin is a model of the same configuration with few layers, a small vocabulary and random weights. Its units are put
into another order. If a slice is missing, or units lie otherwise on some axis, other numbers meet and the logits move.
"""

import re
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fuselm.models.pruning.configs import read_size, resize_config

if TYPE_CHECKING:
    from fuselm.models.pruning.coupling import Coupling

TOKENS = 61  # of a twin's vocabulary
MLP_WIDTH = 64  # of a twin, whatever the model's
LENGTH = 13  # tokens that a twin reads
TOLERANCE = 1e-4  # of logits in float32, relative to the largest
_TOKEN_IDS = re.compile(r".*token_(id|index)")


def make_twin(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with random weights: one layer of each kind, at least two, narrow MLPs and few tokens.

    Its weights are far from the usual ones, so that every norm, bias and head matters. Other sizes stay, because
    configurations demand much of them.
    """
    small = _shrink(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, attn_implementation="eager").eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim > 1:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(0.3 * noise)
    return model


def is_unmoved(twin: PreTrainedModel, coupling: "Coupling") -> bool:
    """Tell whether a twin's logits stay when the units of every place are put into another order."""
    state = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    moved = coupling.select(state, {place: _draw_order(coupling.units, generator) for place in coupling.slices})
    if any(moved[name].shape != tensor.shape for name, tensor in state.items()):
        return False
    inputs = {"input_ids": (torch.arange(LENGTH) * 7 % TOKENS)[None], "use_cache": False}
    with torch.inference_mode():
        expected = twin(**inputs).logits
        logits = torch.func.functional_call(twin, moved, kwargs=inputs, tie_weights=True).logits
    return bool((logits - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _draw_order(units: int, generator: torch.Generator) -> torch.Tensor:
    """Return an order in which no unit keeps its place, if there are several."""
    order = torch.randperm(units, generator=generator)
    cycle = torch.empty_like(order)
    cycle[order] = order.roll(1)
    return cycle


def _shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    layers = read_size(config, "layers")
    if layers is not None:
        kept = _choose_layers(config, layers)
        config = resize_config(config, {"layers": len(kept)}, kept)
    width = read_size(config, "mlp")
    if width is not None and width > MLP_WIDTH:
        config = resize_config(config, {"mlp": MLP_WIDTH})
    given = config.to_dict()
    text = given["text_config"] if isinstance(given.get("text_config"), dict) else given
    text |= {name: 0 for name, value in text.items() if _TOKEN_IDS.fullmatch(name) and isinstance(value, int | list)}
    text["vocab_size"] = TOKENS
    return type(config).from_dict(given)


def _choose_layers(config: PreTrainedConfig, layers: int) -> list[int]:
    """Return the first layer of each kind, as far as the configuration tells them apart, and at least two."""
    text = config.get_text_config().to_dict()
    lists = [value for value in text.values() if isinstance(value, list) and len(value) == layers]
    first: dict[str, int] = {}
    for layer in range(layers):
        first.setdefault(repr([value[layer] for value in lists]), layer)
    kept = sorted(first.values())
    return kept if len(kept) > 1 else sorted({*kept, *range(min(2, layers))})
