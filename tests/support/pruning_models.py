"""Make tiny models of every family that pruning is tested on, and read what they make of some tokens."""

import torch
from breadth import architectures
from transformers import AutoModelForCausalLM, PreTrainedModel

FAMILIES = {  # by name, with the structures that a model of it can lose and stay ordinary
    "llama": ("mlp", "groups", "hidden", "layers"),
    "llama (tied)": ("mlp", "groups", "hidden", "layers"),
    "qwen2": ("mlp", "groups", "hidden", "layers"),
    "gemma3_text": ("mlp", "groups", "hidden", "layers"),
    "phi": ("mlp", "groups", "hidden", "layers"),
    "mixtral": ("mlp", "groups", "hidden", "layers"),
    "gpt_neox": ("mlp", "layers"),
    "opt": ("mlp", "layers"),
    "falcon": ("mlp", "layers"),
    "mpt": ("layers",),
    # fused projections, interleaved ones, and norms over heads
    "phi3": ("mlp", "groups", "hidden", "layers"),
    "gpt_oss": ("mlp", "groups", "hidden", "layers"),
    "olmo2": ("mlp", "groups", "hidden", "layers"),
}
PAIRS = [(family, structure) for family, structures in FAMILIES.items() for structure in structures]
COUPLED = [(family, structure) for family, structure in PAIRS if structure != "layers"]
IDS = (torch.arange(17) * 11 % 384)[None]


def make_model(
    family: str, layers: int = 3, dtype: torch.dtype = torch.float32, vocabulary: int | None = None
) -> PreTrainedModel:
    """Return a random model of a family, in which all numbers matter and grouped queries share keys."""
    config = architectures.tiny_config(family)
    given = config.to_dict()
    if "num_key_value_heads" in given:
        given |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    if isinstance(given.get("num_hidden_layers"), int):
        given["num_hidden_layers"] = layers
        kinds = given.get("layer_types")
        if kinds:
            given["layer_types"] = [kinds[n % len(kinds)] for n in range(layers)]
    else:
        given["n_layers"] = layers
    if vocabulary is not None:
        given["vocab_size"] = vocabulary
    config = type(config).from_dict(given)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(architectures.NOISE * torch.randn_like(parameter))
    return model


def read_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return a model's logits of some tokens."""
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits
