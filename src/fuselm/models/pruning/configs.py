"""Change the sizes that a model's configuration names: MLP width, key-value groups, layers, hidden width.

All layers have the same sizes, so the configuration stays an ordinary one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

# Names that transformers' configurations have for each size; the first that a configuration has counts.
_KEYS: dict[str, tuple[str, ...]] = {
    "mlp": ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "groups": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_heads", "n_head", "n_heads"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "d_model", "n_embd"),
}
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_EQUAL_TO_HIDDEN = ("word_embed_proj_dim",)  # OPT projects embeddings whose width differs from the hidden width


def read_size(config: PreTrainedConfig, structure: str) -> int | None:
    """Return how many units of a structure each layer has; None if the configuration has no one number for it."""
    key = _find_key(_text_part(config.to_dict()), structure)
    return None if key is None else _text_part(config.to_dict())[key]


def name_size(config: PreTrainedConfig, structure: str) -> str | None:
    """Return the configuration's own name of a size."""
    return _find_key(_text_part(config.to_dict()), structure)


def count_heads(config: PreTrainedConfig) -> int:
    """Return the number of query heads of a layer."""
    text = _text_part(config.to_dict())
    return next(text[key] for key in _HEADS if isinstance(text.get(key), int))


def read_head_size(config: PreTrainedConfig) -> int:
    """Return the channels of a head."""
    text = _text_part(config.to_dict())
    given = text.get("head_dim")
    return given if isinstance(given, int) else text[_find_key(text, "hidden") or "hidden_size"] // count_heads(config)


def resize_config(
    config: PreTrainedConfig, sizes: Mapping[str, int], kept_layers: Sequence[int] | None = None
) -> PreTrainedConfig:
    """Return a configuration with other sizes; `kept_layers` are those that remain, by default the first.

    A head keeps its size, and a group its number of query heads. Raises `ValueError`, or whatever the configuration's
    class raises, if it takes no such sizes.
    """
    given = config.to_dict()
    text = _text_part(given)
    changed: dict[str, Any] = {}
    for structure, size in sizes.items():
        key = _find_key(text, structure)
        if key is None:
            raise ValueError(f"{config.model_type}: config.json has no one number for {structure}")
        if size == text[key]:
            continue
        changed[key] = size
        if structure == "groups" and (heads := next(k for k in _HEADS if isinstance(text.get(k), int))) != key:
            changed[heads] = text[heads] // text[key] * size
        if structure in ("groups", "hidden") and not isinstance(text.get("head_dim"), int) and _takes_head_size(config):
            changed["head_dim"] = read_head_size(config)
        if structure == "hidden":
            changed |= {name: size for name in _EQUAL_TO_HIDDEN if text.get(name) == text[key]}
        if structure == "layers":
            layers = list(range(size)) if kept_layers is None else list(kept_layers)
            for name, value in text.items():
                if isinstance(value, list) and len(value) == text[key]:
                    changed[name] = [value[n] for n in layers]
    text |= changed
    return type(config).from_dict(given)


def _takes_head_size(config: PreTrainedConfig) -> bool:
    """Tell whether the configuration may name the size of a head, which its model may use or not."""
    return not isinstance(getattr(type(config.get_text_config()), "head_dim", None), property)


def _text_part(given: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that describes the language model."""
    return given["text_config"] if isinstance(given.get("text_config"), dict) else given


def _find_key(text: Mapping[str, Any], structure: str) -> str | None:
    for key in _KEYS[structure]:
        if isinstance(text.get(key), int) and not isinstance(text[key], bool):
            return key
    return None
