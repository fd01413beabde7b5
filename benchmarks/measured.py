"""Keep what experiments measured in docs/measured.tar.xz, without the stores and weights that they made.

    python benchmarks/measured.py keep [RUNS]
    python benchmarks/measured.py unpack [RUNS]

With it `fuselm study` resumes on another machine where it was on this one: an arm whose history and scores are there is
not trained again, unless its recipe has changed; nor is a benchmark run again whose outcome is there. `make results`
unpacks first. What is kept stays until the archive is deleted.
"""

import io
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fuselm.system import atomic_files

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs/measured.tar.xz"
STUDIES = ("study", "study-tokens", "study-parts", "study-prune", "study-pairwise", "study-baseline")
NAMES = ("manifest.json", "history.json", "scores.json", "documents.jsonl")
STAGES = ("corpus", "train", "merge", "evaluate")  # the others' manifests would say that their stores are there
BENCHMARKS = ("apart.json", "peers.json", "training.json", "full/tasks.md", "full/tasks/results.md")


def measured(runs: Path) -> Iterator[Path]:
    """Yield the files to keep, below `runs`, of stages and benchmarks that are finished."""
    for study in STUDIES:
        for path in sorted(runs.glob(f"{study}/seed-*/*/*/manifest.json")):
            if path.parts[-3] in STAGES and not path.parent.name.endswith(".partial"):
                yield from (path.parent / name for name in NAMES if (path.parent / name).is_file())
    yield from (runs / name for name in BENCHMARKS if (runs / name).is_file())


def _whole(name: str) -> str:
    """Name what a file is kept together with: a benchmark's file stands alone, a stage's files belong together."""
    return name if name in BENCHMARKS else name.rpartition("/")[0]


def keep(runs: Path, kept: Path = KEPT) -> int:
    """Add to the archive, replacing what it has of the same stages and benchmarks; return the number of files.

    The same files give the same bytes. Raises `ValueError` where there are none.
    """
    found = {str(path.relative_to(runs)): path.read_bytes() for path in measured(runs)}
    if not found:
        raise ValueError(f"{runs}: nothing there that was measured; name the folder that has study/ in it")
    added = {_whole(name) for name in found}
    before = {name: data for name, data in _read(kept).items() if _whole(name) not in added}
    partial = kept.with_name(kept.name + ".partial")
    with lzma.open(partial, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in sorted((before | found).items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    partial.replace(kept)
    return len(found)


def unpack(runs: Path, kept: Path = KEPT) -> int:
    """Write into `runs` what is not there yet; return the number of files.

    A stage's manifest comes last, because a stage with a manifest counts as finished.
    """
    if not kept.is_file():
        raise ValueError(f"{kept}: no such file; `keep` writes it")
    missing = {name: data for name, data in _read(kept).items() if not (runs / name).exists()}
    for name in sorted(missing, key=lambda name: name.endswith("manifest.json")):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(runs / name, missing[name].decode())
    return len(missing)


def _read(kept: Path) -> dict[str, bytes]:
    """Read the archive's files; return none if there is no archive."""
    if not kept.is_file():
        return {}
    try:
        with tarfile.open(kept) as archive:
            return {entry.name: archive.extractfile(entry).read() for entry in archive}
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{kept}: damaged ({error}); take it from the repository again") from None


def main() -> None:
    does = {"keep": keep, "unpack": unpack}
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in does:
        sys.exit(__doc__)
    runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")
    try:
        print(f"{sys.argv[1]}: {does[sys.argv[1]](runs)} files")
    except (ValueError, OSError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")


if __name__ == "__main__":
    main()
