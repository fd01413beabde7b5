"""Find a model, wherever it is: a hub id, a local folder or a local GGUF file.

`locate_model` returns what a run needs to know of a model, without loading torch or transformers unless a GGUF file has
to be converted. Results that take long (hashes of weights, a folder converted from GGUF) are kept under
`$FUSELM_CACHE`, by default `~/.cache/fuselm`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fuselm.models import checkpoints, fused_models, gguf_files, hub, tokenizer_files
from fuselm.models.checkpoints import UNLIMITED
from fuselm.system import local_copies
from fuselm.system.remote_paths import is_remote, open_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Describe a causal language model on this disk. Fingerprints are 16 hex digits of a sha256.

    >>> model = fuselm.locate_model("models/target")
    >>> model.name, model.context_length
    ('models/target', 512)
    """

    name: str  # the user wrote it so
    folder: Path  # config.json, weights, tokenizer files
    fingerprint: str  # of names and contents of the weight files and config.json
    tokenizer_fingerprint: str  # of the tokenizer files' contents, BOS and EOS
    output_size: int  # rows of the output layer
    context_length: int  # tokens
    context_token: int  # position 0 is predicted from it
    parameters_bytes: int  # size of the weight files


def locate_model(spec: str | Path, *, revision: str | None = None) -> Model:
    """Return the model that `spec` names: a folder, a GGUF file or a hub id; also `s3://bucket/folder`.

    The folder of a finished run stands for its fused model. A GGUF file is converted at its first use, and a hub id is
    downloaded.

    Raises:
        ValueError: If there is no such model, or it is not a whole causal language model with its tokenizer.

    >>> fuselm.locate_model("models/target").folder.name
    'target'
    """
    spec = str(spec)
    path = _find_path(spec)
    if revision is not None and path.exists():
        raise ValueError(f"{spec}: a local path has no revision (got {revision!r}); leave `revision` out")
    if path.is_dir():
        return _describe_folder(spec, fused_models.find_model_folder(spec, path))
    if path.is_file():
        return _describe_folder(spec, gguf_files.convert_gguf_file(path))
    return _describe_folder(spec, hub.download_snapshot(spec, revision))


def locate_tokenizer(spec: str | Path) -> Model:
    """Return a model that a server holds, described by its tokenizer here: a folder, a GGUF file or a hub id.

    Its fingerprint is empty. The output layer has the size that config.json says; without one, the tokenizer's.
    Raises `ValueError` if there is no such tokenizer.
    """
    spec = str(spec)
    path = _find_path(spec)
    folder = (
        gguf_files.convert_gguf_file(path)
        if path.is_file()
        else fused_models.find_model_folder(spec, path)
        if path.is_dir()
        else hub.download_snapshot(spec, None, False)
    )
    config = checkpoints.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    fingerprint, context_token = tokenizer_files.identify_tokenizer(folder, config)
    size = checkpoints.read_sizes(folder, config)[0] if config else None
    return Model(
        name=spec,
        folder=folder,
        fingerprint="",
        tokenizer_fingerprint=fingerprint,
        output_size=size or 1 + max(tokenizer_files.load_fast_tokenizer(folder).get_vocab().values()),
        context_length=UNLIMITED,
        context_token=context_token,
        parameters_bytes=0,
    )


def _find_path(spec: str) -> Path:
    """Return where a model would be on this machine; a remote one is copied there."""
    if not is_remote(spec):
        return Path(os.path.expanduser(spec))
    path = open_path(spec)
    try:
        if path.is_file():
            return local_copies.fetch_file(path)
        return local_copies.fetch_folder(fused_models.find_model_folder(spec, path))
    except FileNotFoundError:
        raise ValueError(f"{spec}: no model there; name a folder with its weights, config.json and tokenizer") from None


def _describe_folder(name: str, folder: Path) -> Model:
    config = checkpoints.read_config(folder)
    weights = checkpoints.list_weight_files(folder, config)
    tokenizer_fingerprint, context_token = tokenizer_files.identify_tokenizer(folder, config)
    size, context_length = checkpoints.read_sizes(folder, config)
    if not 0 <= context_token < size:
        raise ValueError(
            f"{folder}: a text begins with token {context_token}, and the model has rows for 0 to {size - 1}; enlarge "
            "its embeddings, or name another bos_token in tokenizer_config.json"
        )
    return Model(
        name=name,
        folder=folder,
        fingerprint=tokenizer_files.digest_files([*weights, folder / "config.json"]),
        tokenizer_fingerprint=tokenizer_fingerprint,
        output_size=size,
        context_length=context_length,
        context_token=context_token,
        parameters_bytes=sum(path.stat().st_size for path in weights),
    )
