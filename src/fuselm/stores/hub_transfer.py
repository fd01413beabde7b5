"""Push a store to the Hugging Face Hub as a dataset with a card, and pull it back, checked before and after."""

import shutil
import tempfile
from pathlib import Path

from fuselm.stores import contents, rules
from fuselm.stores.store_card import write_card
from fuselm.stores.verification import Verdict, verify_store
from fuselm.system import atomic_files, file_lock, hub_repositories, local_copies, manifest
from fuselm.system.progress import Progress
from fuselm.system.remote_paths import RemotePath

MANIFEST, CARD = "manifest.json", "README.md"


def push_store(folder: Path, repository: str, *, private: bool, progress: Progress) -> str:
    """Send a store and its card to a dataset repository of the Hub, and return the repository's address.

    The repository is created if it is not there. Raises `ValueError` if the store is not whole, or the Hub refuses.
    """
    hub_repositories.check_name(repository)
    verdict = verify_store(folder, progress=progress)
    if verdict.problems:
        raise ValueError(f"{_list_problems(verdict)}; `fuselm store subset` makes a whole store of what is left")
    facts = contents.read_facts(folder)
    folder = local_copies.fetch_folder(folder)
    files = {name: folder / name for name in [*manifest.read(folder)["files"], MANIFEST]}
    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / CARD
        card.write_text(write_card(facts, repository), encoding="utf-8")
        message = f"Add a store of stage {facts['stage']} with {facts['documents']:,} documents"
        files = {CARD: card, **files}
        return hub_repositories.upload_files(repository, "dataset", files, private=private, message=message)


def pull_store(repository: str, out: Path, *, revision: str | None, progress: Progress) -> None:
    """Fetch a store from a dataset repository of the Hub to the folder `out`, and check all of it.

    The next call resumes what was cut off. Raises `ValueError` if `out` is there, if the repository holds no store, or
    if what arrived is not what the manifest says.
    """
    if isinstance(out, RemotePath):
        raise ValueError(f"{out}: is remote; pull to a folder of this machine and copy that")
    if out.exists():
        raise ValueError(f"{out}: there already, and nothing is overwritten; name another folder")
    commit = hub_repositories.find_revision(repository, "dataset", revision)
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with file_lock.hold_lock(out.with_name(f".{out.name}.pull.lock")):
        if out.exists():  # another process pulled it while this one waited
            raise ValueError(f"{out}: there already, and nothing is overwritten; name another folder")
        hub_repositories.download_files(repository, "dataset", [MANIFEST], partial, commit=commit)
        names = _read_names(partial, repository)
        hub_repositories.download_files(repository, "dataset", names, partial, commit=commit)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # of huggingface_hub, which resumes by it
        verdict = verify_store(partial, progress=progress)
        if verdict.problems:
            shutil.rmtree(partial)
            raise ValueError(
                f"{repository}: what arrived is not a whole store and was deleted ({_list_problems(verdict)}); run the "
                "same command again, or ask its owner to push it again"
            )
        partial.rename(out)
        atomic_files.fsync(out.parent)


def _read_names(partial: Path, repository: str) -> list[str]:
    """Return the files that a pulled manifest names. Raises `ValueError` if it is not the manifest of a store."""
    try:
        if not (partial / MANIFEST).is_file():
            raise ValueError("it has no manifest.json")
        made = manifest.read(partial)
        rules.read_expectations(made)
    except ValueError as error:
        shutil.rmtree(partial)
        raise ValueError(f"{repository}: not a store that fuselm pushed ({error}); check the name") from None
    return list(made["files"])


def _list_problems(verdict: Verdict) -> str:
    first, *others = map(str, verdict.problems)
    return first + (f" (and {len(others)} more)" if others else "")
