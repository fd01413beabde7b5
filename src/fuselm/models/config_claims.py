"""Compare what config.json claims with what a checkpoint holds, before and after its weights are loaded."""

import contextlib
import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fuselm.models.locating import Model
from fuselm.system import fingerprints
from fuselm.system.errors import summarize_error

if TYPE_CHECKING:
    import transformers

MOST_PARAMETERS_A_BYTE = 2  # unpacked weights of 8 bits have one parameter a byte
FEW_PARAMETERS = 1 << 20
MOST_BUFFERS = 1 << 33  # bytes of masks and tables of positions, which a model makes beside its weights


def check_size(model: Model) -> None:
    """Raise `ValueError` if transformers has no class for the model, or config.json describes a much larger model.

    The model is built without memory, because it may claim more than the machine has, and only once.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    key = f"fits {model.fingerprint} {version('transformers')}"
    if not model.fingerprint or fingerprints.recall(key):
        return
    try:
        config = AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an unknown or damaged configuration may raise anything
        raise ValueError(f"{model.name}: transformers cannot load it ({summarize_error(error)})") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{model.name}: transformers has no causal language model for {type(config).__name__}, which may read "
            "images or speech as well as text; give its language model, saved by itself"
        )
    size = buffers = 0
    with contextlib.suppress(Exception), torch.device("meta"):  # loading says why a model cannot be built
        built = AutoModelForCausalLM.from_config(config)
        size = sum(weight.numel() for weight in built.parameters())
        buffers = sum(buffer.nbytes for buffer in built.buffers())
    packed = 8 if getattr(config, "quantization_config", None) else 1  # weights may share a byte
    if size > MOST_PARAMETERS_A_BYTE * packed * model.parameters_bytes + FEW_PARAMETERS or (
        buffers > max(MOST_BUFFERS, 4 * model.parameters_bytes)
    ):
        raise ValueError(
            f"{model.name}: config.json describes {size:,} parameters and {buffers:,} bytes of buffers, and the "
            f"weights have {model.parameters_bytes:,} bytes; they are not of the same model"
        )
    fingerprints.remember(key, True)


def check_loaded_weights(model: Model, loaded: "transformers.PreTrainedModel", info: dict[str, Any]) -> None:
    """Raise `ValueError` unless the checkpoint has the weights that config.json describes, and no more of their kind.

    `info` is what transformers reports of loading them.
    """
    if info["mismatched_keys"]:
        name, stored, described = min(info["mismatched_keys"])
        raise ValueError(
            f"{model.name}: config.json describes {name} as {_format_shape(described)}, and the checkpoint has "
            f"{_format_shape(stored)}; they are not of the same model"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{model.name}: {len(missing)} weights are missing from the checkpoint, the first {missing[0]}"
        )
    if left_out := _find_left_out(loaded, info["unexpected_keys"]):
        raise ValueError(
            f"{model.name}: the checkpoint has {len(left_out)} weights that config.json leaves out, the first "
            f"{left_out[0]}; correct its number of layers, or whatever else leaves them out"
        )


def _find_left_out(loaded: "transformers.PreTrainedModel", unread: Iterable[str]) -> list[str]:
    """Return the unread weights that belong to the model, such as those of a layer beyond its last one.

    Weights of anything else, such as another head, change nothing that is computed here. Neither do the layers that
    some models have behind their last one to predict later tokens.
    """
    if getattr(loaded.config, "num_nextn_predict_layers", 0):
        return []

    def without_numbers(name: str) -> str:
        return re.sub(r"\d+", "#", name.rpartition(".")[0])

    parts = {without_numbers(name) for name, _ in loaded.named_parameters()}
    return sorted(name for name in unread if name.endswith((".weight", ".bias")) and without_numbers(name) in parts)


def _format_shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))
