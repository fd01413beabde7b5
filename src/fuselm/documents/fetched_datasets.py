"""Fetch texts by the `datasets` library, from the Hugging Face hub or from a folder here, into a file of rows.

The file is kept in the cache, under a key of what was asked for, so a run reads the same rows each time and asks the
hub once. From there it is read as any other file of texts.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuselm.documents import conversation_rows
from fuselm.documents.arrow_folders import SPLITS, is_saved_dataset
from fuselm.system import atomic_files, fingerprints, progress
from fuselm.system.errors import summarize_error
from fuselm.system.library_output import hide_library_output
from fuselm.system.server_keys import hide_key


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRequest:
    """Say which rows of which dataset are asked for; the fields are the options of `corpus.dataset`."""

    path: str
    name: str | None = None
    revision: str | None = None
    split: str | None = None
    text: str = "text"
    domain: str | None = None
    streaming: bool = False
    limit: int | None = None


def fetch_dataset(request: DatasetRequest) -> Path:
    """Return a file of JSON lines with the rows that are asked for, after fetching them if they are not there yet.

    The file has the name of the dataset. Raises `ValueError` if the dataset cannot be loaded, or a row has no text.
    """
    folder = Path(request.path)
    _check_request(request, folder)
    inputs = [f"{file.relative_to(folder)} {fingerprints.hash_file_once(file)}" for file in _list_files(folder)]
    key = fingerprints.hash_lines([json.dumps(asdict(request), sort_keys=True), *inputs])
    fetched = fingerprints.find_cache_folder() / "datasets" / key / f"{folder.absolute().name}.jsonl"
    if not fetched.exists():
        fetched.parent.mkdir(parents=True, exist_ok=True)
        with progress.announce(f"fetching {request.path} by `datasets`"), _quiet_library():
            rows = _read_rows(request, _open_dataset(request, folder))
            atomic_files.write_file(fetched, lambda path: _write_rows(path, rows))
    return fetched


def _check_request(request: DatasetRequest, folder: Path) -> None:
    """Raise `ValueError` if an option has no effect on a dataset in a folder here."""
    if not folder.exists():
        return
    saved = is_saved_dataset(folder)
    has_splits = not saved or (folder / SPLITS).is_file()
    useless = {
        "revision": request.revision is not None,
        "name": saved and request.name is not None,
        "streaming": saved and request.streaming,
        "split": not has_splits and request.split is not None,
    }
    for option in (option for option, is_given in useless.items() if is_given):
        raise ValueError(f"corpus.dataset.{option}: does nothing, because {folder} is a dataset on this disk; drop it")


def _list_files(folder: Path) -> list[Path]:
    """List the files of a dataset in a folder here, without caches; none for one on the hub."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(("cache-", ".")))


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the bars of `datasets` off the screen. Raises `ValueError` if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "corpus.dataset: the datasets library is not installed; pip install 'fuselm[datasets]'"
        ) from None
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with hide_library_output():
            yield
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


def _open_dataset(request: DatasetRequest, folder: Path) -> Any:
    """Return the split of the dataset, as `datasets` has it."""
    import datasets
    from huggingface_hub import get_token

    split = request.split or "train"
    try:
        if not is_saved_dataset(folder):
            return datasets.load_dataset(
                request.path, request.name, split=split, revision=request.revision, streaming=request.streaming
            )
        saved = datasets.load_from_disk(str(folder))
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    except Exception as error:  # the library raises errors of any type, and quotes answers of the hub
        said = hide_key(summarize_error(error), get_token() or "")
        there = _list_splits(request, folder)
        fix = f"its splits are {', '.join(there)}" if there else "check path, name, split and the network"
        raise ValueError(
            f"corpus.dataset: {request.path}: `datasets` cannot load split '{split}' ({said}); {fix}"
        ) from None


def _list_splits(request: DatasetRequest, folder: Path) -> list[str]:
    """Return the splits of a dataset that lacks the one asked for, or none if they are not known."""
    import datasets

    try:
        if is_saved_dataset(folder):
            there = list(datasets.load_from_disk(str(folder)))
        else:
            there = datasets.get_dataset_split_names(request.path, request.name, revision=request.revision)
    except Exception:  # the library raises errors of any type
        return []
    asked = (request.split or "train").partition("[")[0]
    return [] if asked in there else [str(split) for split in there]


def _read_rows(request: DatasetRequest, dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield each row's text or conversation, and its domain.

    A class label stands for its name, and a missing text for an empty one. A row is a conversation if it has the fields
    of one, and has no column of texts.
    """
    asked = {"text": request.text} | ({} if request.domain is None else {"domain": request.domain})
    feature = (dataset.features or {}).get(request.domain)
    spell = getattr(feature, "int2str", None)
    for number, row in enumerate(itertools.islice(_iterate(request, dataset), request.limit), 1):
        where = f"corpus.dataset: {request.path}: row {number}"
        form = None if request.text in row else conversation_rows.find_form(row, {})
        names = asked if form is None else {name: of for name, of in asked.items() if name != "text"}
        for option, name in names.items():
            if name not in row:
                raise ValueError(f"{where}: no column '{name}' (found {', '.join(row)}); set corpus.dataset.{option}")
        text, domain = row.get(request.text), None if request.domain is None else row[request.domain]
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: '{request.text}' is a {type(text).__name__}, and needs to be a string")
        if spell is not None and isinstance(domain, int) and domain >= 0:
            domain = spell(domain)
        if not isinstance(domain, str | int | float | None):
            raise ValueError(f"{where}: '{request.domain}' is a {type(domain).__name__}, and needs to be a name")
        if form is None:
            content: dict[str, Any] = {"text": text or ""}
        else:
            fields = (*conversation_rows.FORMS[form], *conversation_rows.BESIDE)
            content = {name: row[name] for name in fields if row.get(name) is not None}
        yield content | ({} if domain is None else {"domain": str(domain)})


def _iterate(request: DatasetRequest, dataset: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows. Raises `ValueError` if reading fails on the way, as when the network does."""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"corpus.dataset: {request.path}: cannot be read ({summarize_error(error)})") from None
        yield row


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
