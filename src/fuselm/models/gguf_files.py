"""Convert GGUF files to ordinary folders. transformers dequantises them; what it leaves out is fixed here."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from fuselm.models import gguf_claims
from fuselm.system import atomic_files, fingerprints, progress
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_gguf_bar, hide_library_output

if TYPE_CHECKING:
    import gguf
    import torch
    import transformers

CONVERSION = 1  # raise this when the same GGUF file is converted to something else
_log = logging.getLogger("fuselm")

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # these are values of tokenizer.ggml.token_type
# llama.cpp cuts text so for these values of tokenizer.ggml.pre:
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
NFC = ("qwen2",)


def convert_gguf_file(path: Path) -> Path:
    """Return the folder that a GGUF file is converted to, now or earlier. Processes wait for each other.

    Raises `ValueError` if the file is damaged or cannot be converted faithfully.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file; needs a model folder or a .gguf file")
    folder = fingerprints.find_cache_folder() / "gguf" / f"{fingerprints.hash_file_once(path)[:16]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    reader = _read_gguf(path)
    with _lock_conversion(path, folder):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left it
            with progress.announce(f"converting {path.name} to an ordinary folder, once: about a minute"):
                _convert_file(path, reader, partial)
            _sync_to_disk(partial)
            partial.rename(folder)
            _sync_to_disk(folder.parent)
    return folder


@contextlib.contextmanager
def _lock_conversion(path: Path, folder: Path) -> Iterator[None]:
    """Wait for other processes that convert the same file. Raises `ValueError` if nothing can be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_suffix(".lock"), "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise ValueError(
            f"{path}: has to be converted, and {folder.parent} cannot be written ({error.strerror}); set FUSELM_CACHE "
            "to a folder that can be written"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync_to_disk(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _read_gguf(path: Path) -> "gguf.GGUFReader":
    """Read metadata and tensors. Raises `ValueError` for a file that is damaged, or that transformers would misread."""
    from gguf import GGUFReader

    try:
        gguf_claims.check_gguf_claims(path)
        reader = GGUFReader(path)
    except Exception as error:  # the reader trusts the file, so a damaged one may raise anything
        raise ValueError(
            f"{path}: GGUF file cut off or damaged ({summarize_error(error)}); download it again"
        ) from error
    if (_read_field(reader, "split.count") or 1) > 1:
        raise ValueError(f"{path}: one part of a split GGUF file; join the parts first (llama-gguf-split --merge)")
    scaling = _read_field(reader, f"{_read_field(reader, 'general.architecture')}.rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name.startswith("rope_f") for tensor in reader.tensors):
        raise ValueError(
            f"{path}: scaled rotary positions, which transformers loses in GGUF files; use the original model"
        )
    if not isinstance(_read_field(reader, "tokenizer.ggml.tokens"), list):
        raise ValueError(f"{path}: no tokenizer in this GGUF file (tokenizer.ggml.tokens); use the original model")
    return reader


def _read_field(reader: "gguf.GGUFReader", key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _convert_file(path: Path, reader: "gguf.GGUFReader", folder: Path) -> None:
    """Write model and tokenizer to `folder`."""
    try:
        # The file lies alone in a folder, because transformers also reads what lies beside it.
        with tempfile.TemporaryDirectory() as alone, hide_library_output(), hide_gguf_bar():
            (Path(alone) / "model.gguf").symlink_to(path.resolve())
            _convert_model(alone, reader).save_pretrained(folder)
            _convert_tokenizer(alone, reader, folder)
            atomic_files.share_modes(folder)
    except Exception as error:  # the disk may be full, and an unknown model may raise anything
        raise ValueError(
            f"{path}: cannot be converted ({summarize_error(error)}); use the original model's folder"
        ) from error


def _convert_model(alone: str, reader: "gguf.GGUFReader") -> "transformers.PreTrainedModel":
    import transformers

    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        alone, gguf_file="model.gguf", dtype=_choose_dtype(reader), output_loading_info=True, **dense
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{len(info['missing_keys'])} weights are not in the file, the first {min(info['missing_keys'])}"
        )
    if not model.config.tie_word_embeddings:
        _tie_copies(model, {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors})
    model.config.__dict__.pop(
        "quantization_config", None
    )  # with it the model could not be saved as an ordinary checkpoint
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.config._name_or_path = ""
    return model


def _choose_dtype(reader: "gguf.GGUFReader") -> "torch.dtype":
    """Return bfloat16 for a quantised file, which has no more precision, and float32 for other files."""
    import torch

    unquantised = sum(tensor.n_elements for tensor in reader.tensors if tensor.tensor_type.name in ("F16", "F32"))
    return torch.float32 if unquantised > sum(tensor.n_elements for tensor in reader.tensors) / 2 else torch.bfloat16


def _tie_copies(model: "transformers.PreTrainedModel", sizes: dict[str, int]) -> None:
    """Tie input and output matrix if they are two roundings of one; keep the one that was stored in more bytes."""
    import torch

    embedding, output = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    if embedding.shape != output.shape:
        return
    if torch.nn.functional.cosine_similarity(embedding.float(), output.float(), dim=1).mean() < 0.99:
        return
    if sizes["output.weight"] > sizes["token_embd.weight"]:
        embedding.copy_(output)
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _convert_tokenizer(alone: str, reader: "gguf.GGUFReader", folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens: list[str] = _read_field(reader, "tokenizer.ggml.tokens")
    _fix_tokens(pipeline, tokens, _read_field(reader, "tokenizer.ggml.token_type") or [1] * len(tokens))
    _fix_splitting(pipeline, _read_field(reader, "tokenizer.ggml.model"), _read_field(reader, "tokenizer.ggml.pre"))
    fixed = Tokenizer.from_str(json.dumps(pipeline))
    if fixed.get_vocab_size() > len(tokens):
        raise ValueError(f"{len(tokens)} tokens became {fixed.get_vocab_size()} in transformers")
    fixed.save(str(folder / "tokenizer.json"), pretty=False)
    atomic_files.write_text(
        folder / "tokenizer_config.json",
        json.dumps(_build_tokenizer_settings(reader, tokens), ensure_ascii=False, indent=1),
    )


def _build_tokenizer_settings(reader: "gguf.GGUFReader", tokens: list[str]) -> dict[str, Any]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _read_field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    if ids["bos_token"] == ids["pad_token"] and not _read_field(reader, "tokenizer.ggml.add_bos_token"):
        ids["bos_token"] = None  # a BOS that only pads is no BOS: Qwen says so, and predicts a fifth worse after it
    settings = {name: None if i is None else tokens[i] for name, i in ids.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    template = _read_field(reader, "tokenizer.chat_template")
    return settings | ({"chat_template": template} if template else {})


def _fix_tokens(pipeline: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """Drop filler rows. Match control and user-defined tokens, and no others, as a whole in a text."""
    filler = {token for i, token in enumerate(tokens) if types[i] == UNUSED and token == f"[PAD{i}]"}
    vocabulary = {token: i for token, i in pipeline["model"]["vocab"].items() if token not in filler}
    named = _find_named_tokens(vocabulary, tokens, types, {"".join(pair) for pair in pipeline["model"]["merges"]})
    for i, spelled in named.items():
        vocabulary[tokens[i]] = vocabulary.pop(spelled)
    pipeline["model"]["vocab"] = vocabulary
    added = {token["content"]: token for token in pipeline["added_tokens"]}
    added = {content: token for content, token in added.items() if vocabulary.get(content) == token["id"]}
    for i in named:
        token = added.setdefault(
            tokens[i], {"content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False}
        )
        token |= {"id": i, "normalized": False, "special": types[i] == CONTROL}
    pipeline["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _find_named_tokens(
    vocabulary: dict[str, int], tokens: list[str], types: list[int], merged: set[str]
) -> dict[int, str]:
    """Return each id that the file names as a control or user-defined token, with how the vocabulary spells it.

    A byte-level vocabulary spells such a token as bytes, for which a text is never searched. Runs of spaces are left
    out, because merges make them, and as added tokens they would get ids beyond the last row. Other tokens that merges
    need are left out, too.
    """
    spelled = {i: token for token, i in vocabulary.items()}
    return {
        i: spelled[i]
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED) and i in spelled and token.strip(" \u2581")
        if spelled[i] == token or (len(spelled[i]) > 1 and spelled[i] not in merged)
    }


def _fix_splitting(pipeline: dict[str, Any], model: str | None, splitter: str | None) -> None:
    """Cut text before the merges as the file says, where transformers does not."""
    if model != "gpt2":
        return
    if splitter in SINGLE_DIGITS:
        bytes_last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        pipeline["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, bytes_last]}
    elif splitter in NFC:
        pipeline["normalizer"] = {"type": "NFC"}
    elif splitter not in (None, "gpt-2", "default", "mpt", "olmo", "jais"):
        _log.warning("tokenizer.ggml.pre is %r, unknown here; compare the tokens that transformers makes", splitter)
