"""Find a model, wherever it is, and load it from an ordinary Hugging Face folder on this disk.

`locate` takes a hub id, a local folder or a local GGUF file and returns what a run needs to know, without loading torch
or transformers unless a GGUF file has to be converted. Results that take long (hashes of weights, a folder converted
from GGUF) are kept under `$FUSELM_CACHE`, by default `~/.cache/fuselm`.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from fuselm.models import checkpoints, gguf_files, hub, tokenizer_files
from fuselm.models.checkpoints import UNLIMITED
from fuselm.models.vocabulary import Vocabulary
from fuselm.system import fingerprints
from fuselm.system.errors import first_line

if TYPE_CHECKING:
    import transformers

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_PARAMETERS_A_BYTE = 2  # of weights that are not packed: 8-bit ones have one
FEW_PARAMETERS = 1 << 20
MOST_BUFFERS = 1 << 33  # bytes that a model makes beside its weights: masks and tables of positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Describe a causal language model on this disk. Fingerprints are 16 hex digits of a sha256.

    >>> model = fuselm.locate("models/target")
    >>> model.name, model.context_length
    ('models/target', 512)
    """

    name: str  # as the user wrote it
    folder: Path  # config.json, weights, tokenizer files
    fingerprint: str  # of the weight files and config.json: names and contents
    tokenizer_fingerprint: str  # of the tokenizer files' contents and the choice of BOS and EOS
    output_size: int  # rows of the output layer
    context_length: int  # tokens
    context_token: int  # what position 0 is predicted from
    parameters_bytes: int  # size of the weight files


def locate(spec: str, *, revision: str | None = None) -> Model:
    """Return the model that `spec` names: a folder, a GGUF file (converted at first use) or a hub id (downloaded).

    Raises:
        ValueError: If there is no such model, or it is not a whole causal language model with its tokenizer.

    >>> fuselm.locate("models/target").folder.name
    'target'
    """
    path = Path(os.path.expanduser(spec))
    if revision is not None and path.exists():
        raise ValueError(f"{spec}: a local path has no revision (got {revision!r}); leave `revision` out")
    if path.is_dir():
        return _describe(spec, path)
    if path.is_file():
        return _describe(spec, gguf_files.converted(path))
    return _describe(spec, hub.download(spec, revision))


def locate_tokenizer(spec: str) -> Model:
    """Return a model whose weights are in a server and whose tokenizer is here: a folder, a GGUF file or a hub id.

    Its fingerprint is empty. The output layer is as large as config.json says, or as the tokenizer, without one.
    Raises `ValueError` if there is no such tokenizer.
    """
    path = Path(os.path.expanduser(spec))
    folder = (
        gguf_files.converted(path) if path.is_file() else path if path.is_dir() else hub.download(spec, None, False)
    )
    config = checkpoints.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    fingerprint, context_token = tokenizer_files.identify(folder, config)
    size = checkpoints.sizes(folder, config)[0] if config else None
    return Model(
        name=spec,
        folder=folder,
        fingerprint="",
        tokenizer_fingerprint=fingerprint,
        output_size=size or 1 + max(load_tokenizer(folder).get_vocab().values()),
        context_length=UNLIMITED,
        context_token=context_token,
        parameters_bytes=0,
    )


def load_tokenizer(model: Model | Path | str) -> Tokenizer:
    """Return the model's fast tokenizer, which neither truncates nor pads.

    >>> tokenizer = fuselm.load_tokenizer("models/target")
    >>> tokenizer.decode(tokenizer.encode("a text").ids)
    'a text'
    """
    return tokenizer_files.load(model.folder if isinstance(model, Model) else Path(model))


def load_vocabulary(model: Model) -> Vocabulary:
    """Return the model's vocabulary: the bytes of every id of its output layer, and how text becomes ids.

    Raises:
        ValueError: If the tokenizer's tokens have no bytes that can be known, or more ids than the output layer.

    >>> vocabulary = fuselm.load_vocabulary(fuselm.locate("models/target"))
    >>> b"".join(vocabulary.token_bytes[i] for i in vocabulary.segment("a text").ids)
    b'a text'
    """
    try:
        return Vocabulary(load_tokenizer(model), model.output_size)
    except ValueError as error:
        raise error if model.name in str(error) else ValueError(f"{model.name}: {error}") from None


def load_model(model: Model, *, dtype: str = "auto", device: str = "auto") -> "transformers.PreTrainedModel":
    """Load a model, ready to evaluate.

    dtype "auto" is the fastest on this machine that is as precise as the checkpoint's (precision.py); device "auto" is
    the first of cuda, mps and cpu.

    Raises:
        ValueError: If the model is not whole, or the device is not there.

    >>> model = fuselm.load_model(fuselm.locate("models/target"), device="cpu")
    >>> model.training
    False
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: unknown; needs one of {', '.join(DTYPES)}")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from fuselm.models import precision
    from fuselm.system import progress

    transformers.utils.logging.disable_progress_bar()  # a second or two; ours is the only bar
    _check_fits(model)
    if dtype == "auto":
        dtype = precision.read_dtype(model, device=device)
    try:
        with progress.doing(f"loading {model.name}"), _without_load_report():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused below, by name
            )
    except Exception as error:  # whatever a broken or unknown checkpoint makes transformers raise
        raise ValueError(f"{model.name}: transformers cannot load it ({first_line(error)})") from error
    if info["mismatched_keys"]:
        name, stored, described = min(info["mismatched_keys"])
        raise ValueError(
            f"{model.name}: config.json describes {name} as {_shape(described)}, and the checkpoint has "
            f"{_shape(stored)}; they are not of the same model"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{model.name}: {len(missing)} weights are missing from the checkpoint, the first {missing[0]}"
        )
    if left_out := _left_out(loaded, info["unexpected_keys"]):
        raise ValueError(
            f"{model.name}: the checkpoint has {len(left_out)} weights that config.json leaves out, the first "
            f"{left_out[0]}; correct its number of layers, or what else says that they are there"
        )
    try:
        loaded.name_or_path = model.name  # which errors say
        return loaded.to(find_device() if device == "auto" else torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: cannot be used ({first_line(error)})") from error


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing a table of the weights that do not fit: what matters of it is one line here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _left_out(loaded: "transformers.PreTrainedModel", unread: Iterable[str]) -> list[str]:
    """Return the unread weights that belong to the model: of a layer beyond its last, or biases of its own parts.

    Weights of anything else, such as another head, change nothing that is computed here; neither do the layers that
    some models have behind their last one to predict later tokens.
    """
    if getattr(loaded.config, "num_nextn_predict_layers", 0):
        return []

    def part(name: str) -> str:
        return re.sub(r"\d+", "#", name.rpartition(".")[0])

    parts = {part(name) for name, _ in loaded.named_parameters()}
    return sorted(name for name in unread if name.endswith((".weight", ".bias")) and part(name) in parts)


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def find_device() -> str:
    """Return the first of cuda, mps and cpu that this machine has."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _check_fits(model: Model) -> None:
    """Raise `ValueError` if `AutoModelForCausalLM` has no class for the model, or one much larger than its weights.

    The model is built without memory for that, and once: what its configuration claims may need more than there is.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    key = f"fits {model.fingerprint} {version('transformers')}"
    if not model.fingerprint or fingerprints.recall(key):
        return
    try:
        config = AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever an unknown or damaged configuration makes transformers raise
        raise ValueError(f"{model.name}: transformers cannot load it ({first_line(error)})") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{model.name}: transformers has no causal language model for {type(config).__name__} (of images or speech "
            "as well as text, maybe); give its language model, saved by itself"
        )
    size = buffers = 0
    with contextlib.suppress(Exception), torch.device("meta"):  # some can't be built so, and fail as they are loaded
        built = AutoModelForCausalLM.from_config(config)
        size = sum(weight.numel() for weight in built.parameters())
        buffers = sum(buffer.nbytes for buffer in built.buffers())
    packed = 8 if getattr(config, "quantization_config", None) else 1  # weights in a byte
    if size > MOST_PARAMETERS_A_BYTE * packed * model.parameters_bytes + FEW_PARAMETERS or (
        buffers > max(MOST_BUFFERS, 4 * model.parameters_bytes)
    ):
        raise ValueError(
            f"{model.name}: config.json describes {size:,} parameters and {buffers:,} bytes beside, and the weights "
            f"have {model.parameters_bytes:,} bytes; they are not of the same model"
        )
    fingerprints.remember(key, True)


def _describe(name: str, folder: Path) -> Model:
    config = checkpoints.read_config(folder)
    weights = checkpoints.weight_files(folder, config)
    tokenizer_fingerprint, context_token = tokenizer_files.identify(folder, config)
    size, context_length = checkpoints.sizes(folder, config)
    if not 0 <= context_token < size:
        raise ValueError(
            f"{folder}: a text begins with token {context_token}, and the model has rows for 0 to {size - 1}; enlarge "
            "its embeddings, or name another bos_token in tokenizer_config.json"
        )
    return Model(
        name=name,
        folder=folder,
        fingerprint=tokenizer_files.digest([*weights, folder / "config.json"]),
        tokenizer_fingerprint=tokenizer_fingerprint,
        output_size=size,
        context_length=context_length,
        context_token=context_token,
        parameters_bytes=sum(path.stat().st_size for path in weights),
    )
