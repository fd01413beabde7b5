"""Load a model that was located, and its tokenizer, from an ordinary Hugging Face folder on this disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from fuselm.models import config_claims, tokenizer_files
from fuselm.models.choices import DTYPES
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_library_output

if TYPE_CHECKING:
    import transformers


def load_tokenizer(model: Model | Path | str) -> Tokenizer:
    """Return the model's fast tokenizer, which neither truncates nor pads.

    >>> tokenizer = fuselm.load_tokenizer("models/target")
    >>> tokenizer.decode(tokenizer.encode("a text").ids)
    'a text'
    """
    return tokenizer_files.load_fast_tokenizer(model.folder if isinstance(model, Model) else Path(model))


def load_vocabulary(model: Model) -> Vocabulary:
    """Return the model's vocabulary: the bytes of every id of its output layer, and how text becomes ids.

    Raises:
        ValueError: If the bytes of tokens cannot be known, or the tokenizer has more ids than the output layer.

    >>> vocabulary = fuselm.load_vocabulary(fuselm.locate_model("models/target"))
    >>> b"".join(vocabulary.token_bytes[i] for i in vocabulary.segment("a text").ids)
    b'a text'
    """
    try:
        return Vocabulary(load_tokenizer(model), model.output_size)
    except ValueError as error:
        raise error if model.name in str(error) else ValueError(f"{model.name}: {error}") from None


def load_model(model: Model, *, dtype: str = "auto", device: str = "auto") -> "transformers.PreTrainedModel":
    """Load a model, ready to evaluate.

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
