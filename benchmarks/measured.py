"""What studies have measured, without the stores and weights that it was measured with: docs/measured.tar.xz.

    python benchmarks/measured.py keep [RUNS]
    python benchmarks/measured.py unpack [RUNS]

With it `fuselm study` goes on on another machine where it was on this one: an arm whose history and scores are there is
not trained again, unless its recipe has changed. `make results` unpacks first.
"""

import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs/measured.tar.xz"
STUDIES = ("study", "study-tokens", "study-parts")
NAMES = ("manifest.json", "history.json", "scores.json", "documents.jsonl")
STAGES = ("corpus", "train", "evaluate")  # the others' manifests would say that their stores are there


def measured(runs: Path) -> Iterator[Path]:
    """The files to keep, below `runs`, of stages that are done."""
    for study in STUDIES:
        for manifest in sorted(runs.glob(f"{study}/seed-*/*/*/manifest.json")):
            if manifest.parts[-3] in STAGES and not manifest.parent.name.endswith(".partial"):
                yield from (manifest.parent / name for name in NAMES if (manifest.parent / name).is_file())


def keep(runs: Path, kept: Path = KEPT) -> int:
    """Write the archive, the same bytes for the same files; return how many those are."""
    files = list(measured(runs))
    with lzma.open(kept, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in files:
            entry = tarfile.TarInfo(str(path.relative_to(runs)))
            entry.size = path.stat().st_size
            with open(path, "rb") as file:
                archive.addfile(entry, file)
    return len(files)


def unpack(runs: Path, kept: Path = KEPT) -> int:
    """Put what is not there into `runs`; return how many files that is. A stage's manifest comes last: with it the
    stage is done."""
    with tarfile.open(kept) as archive:
        missing = [entry for entry in archive if not (runs / entry.name).parent.joinpath("manifest.json").exists()]
        for entry in sorted(missing, key=lambda e: e.name.endswith("manifest.json")):
            archive.extract(entry, runs, filter="data")
    return len(missing)


def main() -> None:
    does = {"keep": keep, "unpack": unpack}
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in does:
        sys.exit(__doc__)
    runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")
    print(f"{sys.argv[1]}: {does[sys.argv[1]](runs)} files")


if __name__ == "__main__":
    main()
