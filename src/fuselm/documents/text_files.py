"""Find the text files that a user names by files, folders and patterns, and the domain of rows that name none."""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fuselm.documents.arrow_folders import ARROW, holds_rows, name_dataset
from fuselm.system import fingerprints
from fuselm.system.remote_paths import RemotePath, open_path

JSON = (".jsonl", ".jsonlines", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
KINDS = (*JSON, *TABLES, *PARQUET, *ARROW, *PLAIN)
_ABOUT_A_FOLDER = ("readme", "license", "licence")  # files that describe a folder of texts


def find_files(names: Sequence[str | Path]) -> list[Path]:
    """Return the files that the given names of files, folders and patterns stand for, in this order, each sorted.

    A folder stands for all files below it of kinds that can be read, except hidden files and files that describe the
    folder or a dataset that was saved in it. Raises `ValueError` if a name does not exist, stands for nothing, or is of
    another kind.
    """
    found = [file for name in names for file in _expand_name(str(open_path(name)) if name else "")]
    for file in found:
        find_kind(file)
    return found


def describe_unread_files(names: Sequence[str | Path]) -> str | None:
    """Describe the files below the named folders that are left out because of their kind; None if there are none."""
    found: Counter[str] = Counter()
    for folder in map(open_path, names):
        below = folder.rglob("*") if folder.is_dir() else ()
        left = [file for file in below if file.is_file() and not _is_text_file(file.relative_to(folder))]
        visible = [file for file in left if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
        found.update(file.suffix or file.name for file in visible if not _is_about_a_folder(file))
    if not found:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common(5)) + (", …" if len(found) > 5 else "")
    return (
        f"corpus.files: {found.total()} files in folders are left out, because their kind is not read ({kinds}); give "
        "plain text the ending .txt, or name a folder without them"
    )


def find_copies(files: Sequence[Path], names: Sequence[str | Path]) -> set[Path]:
    """Return the files, found below folders and by patterns, that are the same as one before them.

    Raises `ValueError` if one of `names` is itself the same as a file before it.
    """
    named = set(map(open_path, names))
    first: dict[str, Path] = {}
    copies: set[Path] = set()
    for file in files:
        same = first.setdefault(fingerprints.hash_file_once(file), file)
        if same is file or not file.stat().st_size:
            continue
        if file in named:
            raise ValueError(f"corpus.files: {same} and {file} are the same; drop one")
        copies.add(file)
    return copies


def check_file(file: Path) -> None:
    """Raise `ValueError` if there is no such file."""
    if not file.is_file():
        raise ValueError(f"{file}: {'is a folder; name its files' if file.is_dir() else 'no such file'}")


def find_kind(file: Path) -> str:
    """Return the lower-case ending that says how a file is read. Raises `ValueError` if it is unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in PARQUET:
            raise ValueError(
                f"{file}: Parquet that is compressed as a whole; decompress it, because it is compressed inside"
            )
        if suffixes and suffixes[-1] in ARROW:
            raise ValueError(f"{file}: an Arrow file that is compressed as a whole; decompress it")
    if not suffixes or suffixes[-1] not in KINDS:
        what = f"a kind of file that is not read ({file.suffix})" if file.suffix else "has no ending that says its kind"
        raise ValueError(
            f"{file}: {what}; needed is {', '.join(KINDS)}, which may be compressed ({', '.join(COMPRESSED)}); convert "
            "it, or give plain text the ending .txt"
        )
    return suffixes[-1]


def name_domains(files: Sequence[Path], list_domains: Callable[[Path], Iterable[str]]) -> list[str]:
    """Return, for each file, the domain of rows that name none: the name of the file or of its saved dataset.

    Several plain text files in one folder are named after the folder instead, because each is only one document, unless
    rows of another file are of a domain with the plain file's name. `list_domains` returns those in a file.
    """
    is_plain = [find_kind(file) in PLAIN for file in files]
    folders = [file.absolute().parent for file, plain in zip(files, is_plain, strict=True) if plain]
    crowded = {folder for folder in folders if folders.count(folder) > 1 and folder.name}
    if not crowded:
        return [name_dataset(file) or strip_endings(file) for file in files]
    named = {d for file, plain in zip(files, is_plain, strict=True) if not plain for d in list_domains(file)}
    return [
        file.absolute().parent.name
        if plain and file.absolute().parent in crowded and strip_endings(file) not in named
        else name_dataset(file) or strip_endings(file)
        for file, plain in zip(files, is_plain, strict=True)
    ]


def _expand_name(name: str) -> list[Path]:
    if not name:
        raise ValueError("texts: an empty name (got ''); name a file, a folder or a pattern")
    path = open_path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        below = [file for file in sorted(path.rglob("*")) if _is_text_file(file.relative_to(path)) and file.is_file()]
        found = [file for file in below if holds_rows(file)]
        if not found:
            raise ValueError(f"{path}: no file below this folder is of a kind that is read ({', '.join(KINDS)})")
        return found
    if not glob.has_magic(name):
        raise ValueError(f"{path}: {'no ordinary file' if path.exists() else 'no such file'}")
    matched = _match(path, name)
    files = [match for match in matched if match.is_file()] or [
        f for match in matched for f in _expand_name(str(match))
    ]
    if not files:
        raise ValueError(f"{path}: no file matches")
    return files


def _match(path: Path, pattern: str) -> list[Path]:
    """Return what a pattern stands for, sorted, on this machine or on a remote file system."""
    if isinstance(path, RemotePath):
        found = path.filesystem.glob(path.key)
        return [open_path(f"{path.protocol}://{str(key).removeprefix(f'{path.protocol}://')}") for key in sorted(found)]
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]


def _is_text_file(file: Path) -> bool:
    if any(part.startswith(".") for part in file.parts) or _is_about_a_folder(file):
        return False
    try:
        find_kind(file)
    except ValueError:
        return False
    return True


def _is_about_a_folder(file: Path) -> bool:
    return file.name.lower().startswith(_ABOUT_A_FOLDER)


def strip_endings(file: Path) -> str:
    """Return the file's name without its ending and without the ending of its compression."""
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSED else file.stem
