"""Keep what experiments measured in docs/measured.tar.xz, without the stores and weights that they made.

    python benchmarks/measured.py keep [RUNS]
    python benchmarks/measured.py unpack [RUNS]

With it `fuselm study` resumes on another machine where it was on this one: an arm whose history and scores are there is
not trained again, unless its recipe has changed; nor is a benchmark run again whose outcome is there. Of what models
answered to tasks the values are kept, and not the texts; of a training's history the scores, and not the loss of every
step. `make results` unpacks first. What is kept stays until the archive is deleted.
"""

import csv
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fuselm.results.tasks import answers
from fuselm.system import atomic_files

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs/measured.tar.xz"
STUDIES = (
    "study",
    "study-tokens",
    "study-parts",
    "study-prune",
    "study-pairwise",
    "study-branches",
    "study-baseline",
    "study-controls",
    "study-second-target",
    "study-tasks",
    "study-chat",
)
HISTORY = "history.json"
NAMES = ("manifest.json", HISTORY, "scores.json", "documents.jsonl", answers.NUMBERS)
STAGES = (
    "corpus",
    "train",
    "merge",
    "evaluate",
    "tasks",
)  # the others' manifests would say that their stores are there
ANSWERS = "answers.csv"  # what is kept of a table of answers: its numbers, not its texts
KEPT_COLUMNS = ("task", "question", "document", "metric", "filter", "value")
DIGITS = 5  # of a value that is kept
BENCHMARKS = ("apart.json", "peers.json", "training.json", "full/tasks/results.md")


def measured(runs: Path) -> Iterator[Path]:
    """Yield the files to keep, below `runs`, of stages and benchmarks that are finished."""
    for study in STUDIES:
        for path in sorted(runs.glob(f"{study}/seed-*/*/*/manifest.json")):
            if path.parts[-3] in STAGES and not path.parent.name.endswith(".partial"):
                yield from (path.parent / n for n in (*NAMES, answers.ROWS) if (path.parent / n).is_file())
    yield from (runs / name for name in BENCHMARKS if (runs / name).is_file())


def write_answers_as_text(table: bytes) -> bytes:
    """Return the values of a table of answers as lines of text, which compress together with those of other models."""
    rows = pq.read_table(io.BytesIO(table), columns=list(KEPT_COLUMNS)).to_pylist()
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(KEPT_COLUMNS)
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:.{DIGITS}g}"
        writer.writerow([*(row[name] for name in KEPT_COLUMNS[:-1]), value])
    return stream.getvalue().encode()


def read_answers_from_text(lines: bytes) -> bytes:
    """Return the table of answers that these lines are of, without the texts of questions and answers."""
    rows = [
        {**row, "question": int(row["question"]), "value": float(row["value"]) if row["value"] else None}
        for row in csv.DictReader(io.StringIO(lines.decode()))
    ]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=answers.SCHEMA), stream)
    return stream.getvalue()


def _whole(name: str) -> str:
    """Name what a file is kept together with: a benchmark's file stands alone, a stage's files belong together."""
    return name if name in BENCHMARKS else name.rpartition("/")[0]


def keep(runs: Path, kept: Path = KEPT) -> int:
    """Add to the archive, replacing what it has of the same stages and benchmarks; return the number of files.

    The same files give the same bytes. Raises `ValueError` where there are none.
    """
    found = dict(_take_file(runs, path) for path in measured(runs))
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


def _take_file(runs: Path, path: Path) -> tuple[str, bytes]:
    """Return a file's name in the archive and what is kept of it."""
    if path.name == answers.ROWS:
        return str(path.with_name(ANSWERS).relative_to(runs)), write_answers_as_text(path.read_bytes())
    data = path.read_bytes()
    if path.name == HISTORY:
        data = json.dumps({"dev": json.loads(data)["dev"]}, sort_keys=True).encode()
    return str(path.relative_to(runs)), data


def unpack(runs: Path, kept: Path = KEPT) -> int:
    """Write into `runs` what is not there yet; return the number of files.

    A stage's manifest comes last, because a stage with a manifest counts as finished.
    """
    if not kept.is_file():
        raise ValueError(f"{kept}: no such file; `keep` writes it")
    missing = {}
    for name, data in _read(kept).items():
        is_table = name.endswith(f"/{ANSWERS}")
        name = f"{name.removesuffix(ANSWERS)}{answers.ROWS}" if is_table else name
        if not (runs / name).exists():
            missing[name] = read_answers_from_text(data) if is_table else data
    for name in sorted(missing, key=lambda name: name.endswith("manifest.json")):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_file(runs / name, lambda path, data=missing[name]: path.write_bytes(data))
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
