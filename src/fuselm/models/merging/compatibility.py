"""Find out before anything is written whether models can be merged, and name what keeps them from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuselm.models.merging.tensor_files import TensorFolder

# Values of config.json that do not say what the weights mean.
_HARMLESS = {
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "quantization_config",
    "max_length",
    "max_position_embeddings",
    "sliding_window",
    "attention_dropout",
    "hidden_dropout",
    "initializer_range",
}
NAMED = 3  # differences of a kind that are named one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Say how models differ: what makes merging impossible, and what it passes over."""

    obstacles: Sequence[str]
    notes: Sequence[str]


def compare_models(folders: Sequence[TensorFolder], vocabulary_tensors: Sequence[str]) -> Comparison:
    """Compare models with the first: architecture, names and shapes of tensors, values of config.json.

    The first axis of `vocabulary_tensors` may differ, because vocabularies are united by token.
    """
    first, obstacles, notes = folders[0], [], []
    config = _flat_config(first)
    for folder in folders[1:]:
        pair, other = f"{first.model.name} and {folder.model.name}", _flat_config(folder)
        if config.get("model_type") != other.get("model_type"):
            obstacles.append(f"{pair}: architectures {config.get('model_type')} and {other.get('model_type')}")
            continue
        missing, added = (sorted(set(a.tensors) - set(b.tensors)) for a, b in ((first, folder), (folder, first)))
        for names, lacking in ((missing, folder), (added, first)):
            if names:
                obstacles.append(f"{pair}: {lacking.model.name} has no {_enumerate(names)}")
        shapes = []
        for name in [name for name in first.tensors if name in folder.tensors]:
            a, b = first.tensors[name].shape, folder.tensors[name].shape
            if (a[1:], len(a)) != (b[1:], len(b)) if name in vocabulary_tensors else a != b:
                shapes.append(f"{name} ({_shape(a)} and {_shape(b)})")
        if shapes:
            obstacles.append(f"{pair}: other shapes of {_enumerate(shapes)}")
        changed = sorted(name for name in config if name in other and config[name] != other[name])
        for name in [name for name in changed if name.rpartition(".")[2] not in _HARMLESS]:
            notes.append(
                f"{pair}: config.json has {name} {config[name]!r} and {other[name]!r}; the result has {config[name]!r}"
            )
    return Comparison(obstacles=obstacles, notes=notes)


def _flat_config(folder: TensorFolder) -> dict[str, Any]:
    config = folder.config
    parts = {name: values for name, values in config.items() if isinstance(values, dict)}
    nested = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {name: value for name, value in config.items() if not isinstance(value, dict)} | nested


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def find_vocabulary_tensors(folder: TensorFolder) -> tuple[list[str], list[str]]:
    """Return the names of the tensors that have a row for each token: those that embed tokens, and the output layer's.

    They are found by the modules of the architecture, whatever those are called. No weights are loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder.model.folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = {id(model.get_input_embeddings()): True, id(model.get_output_embeddings()): False}
    embeddings, outputs = [], []
    for name, module in model.named_modules():
        if id(module) in modules:
            own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            (embeddings if modules[id(module)] else outputs).extend(own)
    return embeddings, outputs
