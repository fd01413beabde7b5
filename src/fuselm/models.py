"""A model, wherever it is, as an ordinary Hugging Face folder on this disk.

`locate` takes a hub id, a local folder or a local GGUF file and says what a run needs to know, without loading torch
or transformers unless a GGUF file has to be converted. What takes long to find out (hashes of weights, a folder
converted from GGUF) is kept under `$FUSELM_CACHE`, by default `~/.cache/fuselm`.
"""

import json
import logging
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from fuselm import fingerprints, gguf_files
from fuselm.errors import first_line
from fuselm.keys import blot

if TYPE_CHECKING:
    import transformers

UNLIMITED = 1 << 31  # the context length of a model whose configuration sets none (RWKV, Mamba)
DTYPES = ("auto", "float32", "bfloat16", "float16")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NEEDED = "needs a Hugging Face model folder: config.json, weights, tokenizer files"
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_TOKENIZER_FILES = ("*.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_log = logging.getLogger("fuselm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A causal language model on this disk. Fingerprints are 16 hex digits of a sha256."""

    name: str  # as the user wrote it
    folder: Path  # config.json, weights, tokenizer files
    fingerprint: str  # of the weight files and config.json: names and contents
    tokenizer_fingerprint: str  # of the tokenizer files' contents and the choice of BOS and EOS
    output_size: int  # rows of the output layer
    context_length: int  # tokens
    context_token: int  # what position 0 is predicted from
    parameters_bytes: int  # size of the weight files


def locate(spec: str, *, revision: str | None = None) -> Model:
    """The model that `spec` names: a folder, a GGUF file (converted at first use) or a hub id (downloaded).

    Raises `ValueError` if there is no such model, or it is not a whole causal language model with its tokenizer.
    """
    path = Path(os.path.expanduser(spec))
    if revision is not None and path.exists():
        raise ValueError(f"{spec}: a local path has no revision (got {revision!r}); leave `revision` out")
    if path.is_dir():
        return _describe(spec, path)
    if path.is_file():
        return _describe(spec, gguf_files.converted(path))
    return _describe(spec, _downloaded(spec, revision))


def locate_tokenizer(spec: str) -> Model:
    """A model of which only the tokenizer is here, for its weights are in a server: a folder, a GGUF file or a hub id.

    Its fingerprint is empty. The output layer is as large as config.json says, or as the tokenizer, without one.
    Raises `ValueError` if there is no such tokenizer.
    """
    path = Path(os.path.expanduser(spec))
    folder = gguf_files.converted(path) if path.is_file() else path if path.is_dir() else _downloaded(spec, None, False)
    has_config = (folder / "config.json").is_file()
    choice = _special_choice(folder, _read_json(folder / "config.json") if has_config else {})
    fingerprint = _tokenizer_fingerprint(folder, choice)
    size = _sizes(folder, _read_json(folder / "config.json"))[0] if has_config else None
    return Model(
        name=spec,
        folder=folder,
        fingerprint="",
        tokenizer_fingerprint=fingerprint,
        output_size=size or 1 + max(load_tokenizer(folder).get_vocab().values()),
        context_length=UNLIMITED,
        context_token=fingerprints.remembered(f"context {fingerprint}", lambda: _context_token(folder, choice)),
        parameters_bytes=0,
    )


def load_tokenizer(model: Model | Path | str) -> Tokenizer:
    """The model's fast tokenizer, which neither truncates nor pads."""
    folder = model.folder if isinstance(model, Model) else Path(model)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{folder}: cannot load a fast tokenizer ({first_line(error)}); {_NEEDED}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_model(model: Model, *, dtype: str = "auto", device: str = "auto") -> "transformers.PreTrainedModel":
    """The model, ready to evaluate. dtype "auto" is the fastest on this machine that is as precise as the checkpoint's
    (precision.py); device "auto" the first of cuda, mps and cpu.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: unknown; needs one of {', '.join(DTYPES)}")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from fuselm import precision

    transformers.utils.logging.disable_progress_bar()  # a second or two; ours is the only bar
    if dtype == "auto":
        dtype = precision.read_dtype(model, device=device)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever a broken or unknown checkpoint makes transformers raise
        raise ValueError(f"{model.name}: transformers cannot load it ({first_line(error)})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{model.name}: {len(missing)} weights are missing from the checkpoint, the first {missing[0]}"
        )
    try:
        loaded.name_or_path = model.name  # which errors say
        return loaded.to(find_device() if device == "auto" else torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: cannot be used ({first_line(error)})") from error


def find_device() -> str:
    """Return the first of cuda, mps and cpu that is here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _describe(name: str, folder: Path) -> Model:
    config = _read_config(folder)
    weights = _weight_files(folder)
    choice = _special_choice(folder, config)
    tokenizer_fingerprint = _tokenizer_fingerprint(folder, choice)
    size, context_length = _sizes(folder, config)
    return Model(
        name=name,
        folder=folder,
        fingerprint=_fingerprint_of([*weights, folder / "config.json"]),
        tokenizer_fingerprint=tokenizer_fingerprint,
        output_size=size,
        context_length=context_length,
        context_token=fingerprints.remembered(
            f"context {tokenizer_fingerprint}", lambda: _context_token(folder, choice)
        ),
        parameters_bytes=sum(path.stat().st_size for path in weights),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, if it is one of a causal language model."""
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        raise ValueError(f"{folder}: empty folder; {_NEEDED}")
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        hint = "an adapter without its base model; merge it first" if "adapter_config.json" in files else _NEEDED
        raise ValueError(f"{folder}: no config.json; {f'name the file: {folder / ggufs[0]}' if ggufs else hint}")
    config = _read_json(folder / "config.json")
    names = config.get("architectures") or []
    usual = any(part in name for name in names for part in ("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    if config.get("is_encoder_decoder") or (names and not usual and not _is_listed_as_causal(names)):
        raise ValueError(
            f"{folder}: not a causal language model (config.json: {', '.join(names) or 'encoder-decoder'}); "
            "needs one that predicts the next token (...ForCausalLM)"
        )
    return config


def _is_listed_as_causal(names: list[str]) -> bool:
    """Tell whether transformers lists one of these classes as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, in its order of preference; all there and of the right length."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            files = [folder / stem]
        elif index.is_file():
            files = [folder / file for file in sorted(set(_read_json(index).get("weight_map", {}).values()))]
        else:
            continue
        if files:
            for file in files:
                _check_weights(file)
            return files
    raise ValueError(f"{folder}: no weights (model.safetensors or pytorch_model.bin, whole or sharded); {_NEEDED}")


def _check_weights(path: Path) -> None:
    """Raise if the file is absent, or a safetensors file is not as long as its header says."""
    if not path.is_file():
        raise ValueError(f"{path}: this part of the weights is missing; download the model again")
    if path.suffix != ".safetensors":
        return
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        whole = path.stat().st_size == 8 + length + end
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes: cut off, or only a pointer to "
            "large-file storage); download the model again"
        )


def _sizes(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Rows of the output layer, and context length in tokens."""
    text = {**config, **(config.get("text_config") or {})}
    size, length = text.get("vocab_size"), _context_length(text)
    if size is None or length is None:  # what equals its class's default may be left out of config.json

        def defaults() -> list[int | None]:
            from transformers import AutoConfig

            whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            full = {key: getattr(whole.get_text_config(), key, None) for key in ("vocab_size", *_CONTEXT_KEYS)}
            return [full["vocab_size"], _context_length(full)]

        try:
            size, length = fingerprints.remembered(f"sizes {fingerprints.sha256(folder / 'config.json')}", defaults)
        except Exception as error:  # whatever an unknown or damaged configuration makes transformers raise
            raise ValueError(f"{folder}/config.json: transformers cannot read it ({first_line(error)})") from error
    if not isinstance(size, int):
        raise ValueError(f"{folder}/config.json: no vocab_size; {_NEEDED}")
    return size, length or UNLIMITED


def _context_length(config: dict[str, Any]) -> int | None:
    return next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int) and config[key] > 0), None)


def _special_choice(folder: Path, config: dict[str, Any]) -> dict[str, str | int | None]:
    """BOS and EOS as the folder's files name them (a string or an id); None where there is none.

    The first file that mentions it decides, even if it says null (Qwen's says that there is no BOS).
    """
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    files = [_read_json(path) for path in paths if path.is_file()]
    choice: dict[str, str | int | None] = {}
    for name in ("bos_token", "eos_token"):
        value = next((file[name] for file in files if name in file), config.get(f"{name}_id"))
        value = next(iter(value), None) if isinstance(value, list) else value
        choice[name] = value.get("content") if isinstance(value, dict) else value
    return choice


def _tokenizer_fingerprint(folder: Path, choice: dict[str, str | int | None]) -> str:
    files = [folder / "tokenizer.json"]
    if not files[0].is_file():
        files = sorted(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))
    if not files:
        raise ValueError(
            f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt); {_NEEDED}"
        )
    return _fingerprint_of(files, json.dumps(choice, sort_keys=True))


def _fingerprint_of(files: list[Path], *settings: str) -> str:
    return fingerprints.digest([*settings, *(f"{file.name} {fingerprints.sha256(file)}" for file in files)])


def _context_token(folder: Path, choice: dict[str, str | int | None]) -> int:
    """BOS if the tokenizer has one, else the end-of-text token."""
    tokenizer = load_tokenizer(folder)
    for value in (choice["bos_token"], choice["eos_token"]):
        token = tokenizer.token_to_id(value) if isinstance(value, str) else value
        if token is not None:
            return token
    raise ValueError(
        f"{folder}: the tokenizer has neither a BOS nor an EOS token to begin a text with; "
        "name one in tokenizer_config.json (bos_token)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({first_line(error)}); download the model again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, needs an object; download the model again")
    return value


def _downloaded(spec: str, revision: str | None, weights: bool = True) -> Path:
    """The snapshot of a hub repository: its configuration, tokenizer and weights, safetensors if it has them."""
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf"):
        raise ValueError(f"{spec}: no such folder or GGUF file; check the path")
    owner = Path(spec).parent
    if owner != Path() and owner.is_dir():  # a path mistyped, rather than a hub id
        raise ValueError(
            f"{spec}: no such folder or GGUF file; check the path ({owner} is a folder here, not a hub owner)"
        )
    if not _HUB_ID.fullmatch(spec):
        raise ValueError(f"{spec}: no such folder or GGUF file, and not a hub id (owner/name); check the path")
    from huggingface_hub import errors, get_token, snapshot_download

    try:
        wanted = ["*.json", "*.jinja", "*.txt", "*.model", *(["model*.safetensors"] if weights else [])]
        folder = Path(snapshot_download(spec, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if weights and not any(folder.glob("model*.safetensors")):
            snapshot_download(spec, revision=revision, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
        return folder
    except errors.GatedRepoError:
        needed = "gated on the hub; accept its terms on its page there, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        needed = f"no revision {revision!r} on the hub; give a branch, tag or commit that exists"
    except errors.RepositoryNotFoundError:
        needed = "not on the hub, or private; check the name, or run `hf auth login`"
    except Exception as error:  # what a hub or mirror answers ends in errors of any type, with its words in them
        said = blot(first_line(error), get_token() or "")
        needed = f"could not be downloaded ({said}); check the network, or give a local folder"
    raise ValueError(f"{spec}: {needed}")
