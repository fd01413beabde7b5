"""Send files to a repository of the Hugging Face Hub, and fetch files from one.

All goes through huggingface_hub: `HF_ENDPOINT` names another hub, `HF_TOKEN` or `hf auth login` gives the token. The
token is in no message. What a call that was cut off has sent or fetched already is not sent or fetched again.
"""

import contextlib
import glob
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

from fuselm.system import progress
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_hub_bars
from fuselm.system.server_keys import hide_key

Kind = Literal["model", "dataset"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_name(repository: str) -> None:
    """Raise `ValueError` unless a repository's name is written as owner/name."""
    if not _NAME.fullmatch(repository):
        raise ValueError(f"{repository}: not the name of a repository on the Hub; write it as owner/name")


def upload_files(repository: str, kind: Kind, files: Mapping[str, Path], *, private: bool, message: str) -> str:
    """Send files to a repository, which is created if it is not there, and return its address.

    `files` maps names in the repository to paths on this machine. Other files of the repository stay, except parts of
    a store that `files` replaces.

    Raises `ValueError`, which says what to do, if the Hub refuses or cannot be reached, or if the repository should be
    private and is there and public.
    """
    check_name(repository)
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ValueError(
            f"{repository}: the Hub needs a token that may write there; run `hf auth login`, or set HF_TOKEN"
        )
    size = sum(path.stat().st_size for path in files.values()) / 1e6
    announced = progress.announce(f"uploading {len(files)} files, {size:,.1f} MB, to {repository}")
    with _name_errors(repository, "uploaded"), announced, hide_hub_bars():
        api = HfApi()
        address = str(api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True))
        is_public = private and not api.repo_info(repository, repo_type=kind).private
        if not is_public:
            _upload_folder(repository, kind, files, message)
    if is_public:
        raise ValueError(
            f"{repository}: is there already and public, so --private cannot hold; name another repository, or make it "
            "private in its settings on the Hub"
        )
    return address


def _upload_folder(repository: str, kind: Kind, files: Mapping[str, Path], message: str) -> None:
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            link = Path(folder) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        HfApi().upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message=message,
            delete_patterns=["part-*.parquet"] if kind == "dataset" else None,
        )


def find_revision(repository: str, kind: Kind, revision: str | None) -> str:
    """Return the commit that a branch, a tag or a commit of a repository stands for; None is its main branch.

    Raises `ValueError` as `download_files` does.
    """
    check_name(repository)
    from huggingface_hub import HfApi

    with _name_errors(repository, "downloaded"), hide_hub_bars():
        return str(HfApi().repo_info(repository, repo_type=kind, revision=revision).sha)


def download_files(repository: str, kind: Kind, names: Collection[str], folder: Path, *, commit: str) -> None:
    """Fetch files of a commit to `folder`, under the names that they have in the repository.

    Raises `ValueError`, which says what to do, if the repository is not there or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    announced = progress.announce(f"downloading {len(names)} files of {repository}")
    with _name_errors(repository, "downloaded"), announced, hide_hub_bars():
        patterns = [glob.escape(name) for name in names]
        snapshot_download(repository, repo_type=kind, revision=commit, local_dir=folder, allow_patterns=patterns)


@contextlib.contextmanager
def _name_errors(repository: str, action: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one line that names the repository and hides the token."""
    from huggingface_hub import errors, get_token

    try:
        yield
        return
    except errors.GatedRepoError:
        needed = "gated on the Hub; accept its terms on its page there, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        needed = "the Hub has no such revision of it; give a branch, tag or commit that exists"
    except errors.RepositoryNotFoundError:
        needed = "not on the Hub, or private; check the name, or run `hf auth login`"
    except Exception as error:  # answers of a hub end in errors of many types, which quote them
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            needed = f"the Hub refuses the token (HTTP {status}); run `hf auth login` with one that may write there"
        else:
            reason = hide_key(summarize_error(error), get_token() or "")
            needed = (
                f"could not be {action} ({reason}); check the network and run the same command again, it resumes here"
            )
    raise ValueError(f"{repository}: {needed}")
