"""Load a model that was located, and its tokenizer, from an ordinary Hugging Face folder on this disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from fuselm.models import config_claims, tokenizer_files
from fuselm.models.choices import DTYPES
from fuselm.models.locating import Model, locate_model, locate_tokenizer
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_library_output

if TYPE_CHECKING:
    import transformers


def load_tokenizer(model: Model | Path | str) -> Tokenizer:
    """Return the fast tokenizer of a model or of a folder, which neither truncates nor pads.

    >>> tokenizer = fuselm.load_tokenizer("models/target")
    >>> tokenizer.decode(tokenizer.encode("a text").ids)
    'a text'
    """
    if isinstance(model, Model):
        return tokenizer_files.load_fast_tokenizer(model.folder)
    folder = Path(model).expanduser()
    if not folder.is_dir() or not any(folder.glob("*token*")):  # a GGUF file, a hub id, or the folder of a run
        folder = locate_tokenizer(model).folder
    return tokenizer_files.load_fast_tokenizer(folder)


def load_vocabulary(model: Model | Path | str) -> Vocabulary:
    """Return the model's vocabulary: the bytes of every id of its output layer, and how text becomes ids.

    `model` is a located model, or what `locate_model` takes.

    Raises:
        ValueError: If the bytes of tokens cannot be known, or the tokenizer has more ids than the output layer.

    >>> vocabulary = fuselm.load_vocabulary(fuselm.locate_model("models/target"))
    >>> b"".join(vocabulary.token_bytes[i] for i in vocabulary.segment("a text").ids)
    b'a text'
    """
    model = as_model(model)
    try:
        return Vocabulary(load_tokenizer(model), model.output_size)
    except ValueError as error:
        raise error if model.name in str(error) else ValueError(f"{model.name}: {error}") from None


def as_model(model: Model | Path | str) -> Model:
    """Return the model that is named, or the model itself."""
    return model if isinstance(model, Model) else locate_model(model)


def load_model(
    model: Model | Path | str, *, dtype: str = "auto", device: str = "auto"
) -> "transformers.PreTrainedModel":
    """Load a model, ready to evaluate. It is a located one, or what `locate_model` takes.

    dtype "auto" chooses the fastest type on this machine that is as precise as the checkpoint's (precision.py); device
    "auto" chooses the first of cuda, mps and cpu.

    Raises:
        ValueError: If the model is not whole, or the device does not exist.

    >>> model = fuselm.load_model(fuselm.locate_model("models/target"), device="cpu")
    >>> model.training
    False
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: unknown; needs one of {', '.join(DTYPES)}")
    import torch
    from transformers import AutoModelForCausalLM

    from fuselm.models import precision
    from fuselm.system import progress

    model = as_model(model)
    config_claims.check_size(model)
    if dtype == "auto":
        dtype = precision.choose_reading_dtype(model, device=device)
    try:
        with progress.announce(f"loading {model.name}"), hide_library_output():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loaded_weights` refuses them by name
            )
    except Exception as error:  # a broken or unknown checkpoint may raise anything
        raise ValueError(f"{model.name}: transformers cannot load it ({summarize_error(error)})") from error
    config_claims.check_loaded_weights(model, loaded, info)
    try:
        loaded.name_or_path = model.name  # errors say this name
        return loaded.to(precision.find_device() if device == "auto" else torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: cannot be used ({summarize_error(error)})") from error
