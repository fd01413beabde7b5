"""Compare stores row by row."""

from pathlib import Path

from captures import Interrupted, captured, documents, source_of  # noqa: F401

from fuselm.system import atomic_files, manifest


def assert_same(folder: Path, expected: Path) -> None:
    """Assert the same rows in the same bytes, and every file as its manifest says."""
    assert contents(folder) == contents(expected)
    files = manifest.read(folder)["files"]
    assert files == {name: atomic_files.hash_file(folder / name) for name in files}
    assert list(files) == list(contents(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet")) if not p.name.startswith(".")}
