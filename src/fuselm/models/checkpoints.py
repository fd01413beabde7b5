"""Read and check config.json and the weights' headers of a model's folder, before anything is loaded.

Whatever can be compared is compared. A file must be as long as its header says. A configuration must not claim more
layers and rows than the weights have, because memory for them would be taken before anyone notices.
"""

import json
import struct
from pathlib import Path
from typing import Any

from fuselm.system import fingerprints
from fuselm.system.errors import summarize_error

UNLIMITED = 1 << 31  # the context length of a model whose configuration sets none (RWKV, Mamba)
NEEDED = "needs a Hugging Face model folder: config.json, weights, tokenizer files"

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model")
_FEW = 256  # so many layers may share the weights of one
_STEMS = ("model.safetensors", "pytorch_model.bin")  # transformers looks for them in this order
_TYPES = (("text_config", dict), ("architectures", list), ("transformers_weights", str), ("quantization_config", dict))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds. Raises `ValueError` if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; download the model again") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({summarize_error(error)}); download the model again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, needs an object; download the model again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises `ValueError` if it does not describe a causal language model."""
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        raise ValueError(f"{folder}: empty folder; {NEEDED}")
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        hint = _describe_adapter(folder) if "adapter_config.json" in files else NEEDED
        raise ValueError(f"{folder}: no config.json; {f'name the file: {folder / ggufs[0]}' if ggufs else hint}")
    if "adapter_config.json" in files:  # transformers would add the adapter to the weights, silently
        raise ValueError(
            f"{folder}: an adapter lies beside whole weights (adapter_config.json), which may include it or not; "
            "move the adapter's files away if they do, or merge it first"
        )
    config = read_json(folder / "config.json")
    _check_types(folder, config)
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or (names and not any(map(_is_causal, names))):
        raise ValueError(
            f"{folder}: not a causal language model (config.json: {', '.join(names) or 'encoder-decoder'}); "
            "needs one that predicts the next token (...ForCausalLM)"
        )
    return config


def _describe_adapter(folder: Path) -> str:
    """Say how an adapter becomes a model, by the base model that it names."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    named = base if isinstance(base, str) and base else "BASE"
    return (
        "an adapter (PEFT) without its base model; merge both first: `fuselm merge FILE.yaml FOLDER` with FILE "
        f"{{method: linear, parameters: {{weight: 1}}, models: ['{named}+{folder}']}}"
    )


def _is_causal(architecture: str) -> bool:
    """Tell whether `AutoModelForCausalLM` may load a class. What the model does is tried once it is loaded."""
    if any(part in architecture for part in ("CausalLM", "LMHeadModel", "ConditionalGeneration")):
        return True
    if any(part in architecture for part in ("ForMaskedLM", "Classification", "QuestionAnswering")):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return any(architecture in (name if isinstance(name, tuple) else (name,)) for name in names.values())


def _check_types(folder: Path, config: dict[str, Any]) -> None:
    for name, kind in _TYPES:
        if not isinstance(value := config.get(name), kind | None):
            said = "an object" if kind is dict else "a list" if kind is list else "a string"
            raise ValueError(
                f"{folder}/config.json: {name} is {_describe_value(value)}, needs {said}; download the model again"
            )
    for name in config.get("architectures") or []:
        if not isinstance(name, str):
            raise ValueError(
                f"{folder}/config.json: architectures has {_describe_value(name)}, needs names; "
                "download the model again"
            )
    text = {**config, **(config.get("text_config") or {})}
    for name in (*_LAYERS, *_WIDTHS, *_CONTEXT_KEYS):
        value = text.get(name)
        if value is None or isinstance(value, list | dict):  # some models have one for each layer or part
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < (1 if name in _WIDTHS else -1):
            said = f"{name} is {_describe_value(value)}, needs a whole number above 0"
            raise ValueError(f"{folder}/config.json: {said}; download the model again")


def _describe_value(value: object) -> str:
    return repr(value) if len(repr(value)) < 40 else f"a {type(value).__name__}"


def list_weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the files that transformers would load, in its order of preference.

    Raises `ValueError` if one is missing or has another length than its header says, or if the configuration claims
    more layers or rows than safetensors files have.
    """
    if named := config.get("transformers_weights"):
        if not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{folder}/config.json: transformers_weights is {named!r}, needs a .safetensors file")
        stems = [named.removesuffix(".index.json")]
    else:
        stems = list(_STEMS)
    for stem in stems:
        index = _require_inside(folder, f"{stem}.index.json")
        if named == index.name or not _require_inside(folder, stem).is_file():
            if not index.is_file():
                continue
            files = _list_shards(folder, index)
        else:
            files = [folder / stem]
        if files:
            headers = [header for file in files if (header := _read_shapes(file)) is not None]
            if len(headers) == len(files):
                _check_claims(folder, config, {name: shape for header in headers for name, shape in header.items()})
            return files
    missing = f"no weights ({named})" if named else f"no weights ({_STEMS[0]} or {_STEMS[1]}, whole or sharded)"
    raise ValueError(f"{folder}: {missing}; {NEEDED}")


def _list_shards(folder: Path, index: Path) -> list[Path]:
    names = read_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map does not name files; download the model again")
    return [_require_inside(folder, name) for name in sorted(set(names.values()))]


def _require_inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the folder. Raises `ValueError` for a name that leads elsewhere."""
    if Path(name).name != name or "\0" in name:
        raise ValueError(f"{folder}: names weights outside this folder ({name!r}); download the model again")
    return folder / name


def _read_shapes(path: Path) -> dict[str, list[int]] | None:
    """Return the shapes in a safetensors file; None for a file of another kind. Raises `ValueError` for a cut one."""
    if not path.is_file():
        raise ValueError(f"{path}: this part of the weights is missing; download the model again")
    if path.suffix != ".safetensors":
        return None
    shapes: dict[str, list[int]] = {}
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        whole = path.stat().st_size == 8 + length + end
        whole = whole and all(isinstance(n, int) and n >= 0 for shape in shapes.values() for n in shape)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes: cut off, or only a pointer to "
            "large-file storage); download the model again"
        )
    return shapes


def _check_claims(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    text = {**config, **(config.get("text_config") or {})}
    longest = max((n for shape in shapes.values() for n in shape), default=0)
    most = dict.fromkeys(_LAYERS, max(len(shapes), _FEW)) | dict.fromkeys(_WIDTHS, longest)
    for name, limit in most.items():
        if isinstance(value := text.get(name), int) and value > limit:
            has = f"{len(shapes)} tensors" if name in _LAYERS else f"no more than {longest} rows"
            raise ValueError(
                f"{folder}/config.json: {name} is {value}, and the weights have {has}; they are not of the same model"
            )


def read_sizes(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Return the rows of the output layer, and the context length in tokens."""
    text = {**config, **(config.get("text_config") or {})}
    size, length = text.get("vocab_size"), _find_context_length(text)
    if size is None or length is None:  # config.json may leave out what equals the default of its class

        def read_defaults() -> list[int | None]:
            from transformers import AutoConfig

            whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            full = {key: getattr(whole.get_text_config(), key, None) for key in ("vocab_size", *_CONTEXT_KEYS)}
            return [full["vocab_size"], _find_context_length(full)]

        try:
            size, length = fingerprints.recall_or_compute(
                f"sizes {fingerprints.hash_file_once(folder / 'config.json')}", read_defaults
            )
        except Exception as error:  # whatever an unknown or damaged configuration makes transformers raise
            raise ValueError(f"{folder}/config.json: transformers cannot read it ({summarize_error(error)})") from error
    if not isinstance(size, int):
        raise ValueError(f"{folder}/config.json: no vocab_size; {NEEDED}")
    return size, min(length or UNLIMITED, UNLIMITED)


def _find_context_length(config: dict[str, Any]) -> int | None:
    return next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int) and config[key] > 0), None)
