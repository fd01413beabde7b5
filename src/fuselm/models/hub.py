"""Fetch a model's files from the Hugging Face hub."""

import re
from pathlib import Path

from fuselm.system import progress
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_hub_bars
from fuselm.system.server_keys import hide_key

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def download_snapshot(spec: str, revision: str | None, weights: bool = True) -> Path:
    """Download a hub repository's configuration, tokenizer and weights, and return the folder of the snapshot.

    Safetensors files are preferred. Raises `ValueError` if the hub does not give the repository.
    """
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf"):
        raise ValueError(f"{spec}: no such folder or GGUF file; check the path")
    owner = Path(spec).parent
    if owner != Path() and owner.is_dir():  # this is a mistyped path rather than a hub id
        raise ValueError(
            f"{spec}: no such folder or GGUF file; check the path ({owner} is a folder here, not a hub owner)"
        )
    if not _HUB_ID.fullmatch(spec):
        raise ValueError(f"{spec}: no such folder or GGUF file, and not a hub id (owner/name); check the path")
    from huggingface_hub import errors, get_token

    try:
        with progress.announce(f"downloading {spec} from the hub"), hide_hub_bars():
            return _download_files(spec, revision, weights)
    except errors.GatedRepoError:
        needed = "gated on the hub; accept its terms on its page there, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        needed = f"no revision {revision!r} on the hub; give a branch, tag or commit that exists"
    except errors.RepositoryNotFoundError:
        needed = "not on the hub, or private; check the name, or run `hf auth login`"
    except Exception as error:  # answers of a hub or mirror end in errors of any type, which quote them
        said = hide_key(summarize_error(error), get_token() or "")
        needed = f"could not be downloaded ({said}); check the network, or give a local folder"
    raise ValueError(f"{spec}: {needed}")


def _download_files(spec: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.txt", "*.model", *(["model*.safetensors"] if weights else [])]
    folder = Path(snapshot_download(spec, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    if weights and not any(folder.glob("model*.safetensors")):
        snapshot_download(spec, revision=revision, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
    return folder
