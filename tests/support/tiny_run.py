"""Run fuselm on tiny models: in this process, in one that may be killed, or as a user starts it."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from fuselm.cli import endings
from fuselm.cli import main as cli
from fuselm.sources import resumable_writing
from fuselm.system import library_output, processes, progress
from fuselm.system.progress import Progress

QUIET = Progress(Console(quiet=True), "")

TRAIN = {
    "learning_rate": 3e-3,
    "passes": 3,
    "batch_documents": 2,
    "evaluations_per_pass": 1,
    "precision": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold what a command left behind."""

    code: int
    out: str
    err: str
    loaded: tuple[str, ...] = ()  # modules

    @property
    def stages(self) -> list[str]:
        """Return the names of the stages that did something, in order."""
        lines = self.err.splitlines()
        return [
            line.partition("  (")[0]
            for line, after in itertools.pairwise(lines)
            if line[:1] not in ("", " ")
            if after[:1] == " "
        ]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write(
    folder: Path, *, target: Path, sources: Mapping[str, Path], rows: Sequence[Mapping[str, str]], **options
) -> Path:
    """Write a run file in `folder`, with its corpus; the run's output is `folder/out`, and it shares no stores."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_rows(folder / "corpus.jsonl", rows)
    run = {
        "output": str(folder / "out"),
        "store_dir": None,
        "target": str(target),
        "sources": {name: str(path) for name, path in sources.items()},
        "corpus": {"files": [str(corpus)]},
        "capture": {"draws": 13, "batch_tokens": 131},
        "train": TRAIN,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run | options, sort_keys=False), encoding="utf-8")
    return folder / "run.yaml"


def short(texts: Sequence[Mapping[str, str]], *, domains: int = 2, length: int = 149) -> list[dict[str, str]]:
    """Return the beginnings of texts of the first domains."""
    chosen = sorted({row["domain"] for row in texts})[:domains]
    return [{"domain": row["domain"], "text": row["text"][:length]} for row in texts if row["domain"] in chosen]


def fuselm(*arguments: object, cache: Path | None = None, columns: int = 211) -> Outcome:
    """Run a command in this process, with so many columns on a line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in endings.STOPPING}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("TOKENIZERS_PARALLELISM", "true")
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(progress, "SECONDS_OF_SILENCE", 3600.0)  # what is said does not depend on how busy the machine is
        patch.setattr(processes, "_shard", None)  # a command that is told its shard tells nobody else
        patch.setattr(sys, "warnoptions", ["error"])  # so that the command leaves warnings errors, as tests have them
        for name, value in library_output.QUIET.items():
            patch.setenv(name, value)
        if cache is not None:
            patch.setenv("FUSELM_CACHE", str(cache))
        patch.setattr(sys, "argv", ["fuselm", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


WATCHED = ("numpy", "torch", "transformers")
COMMAND = f"""
import atexit, os, sys
from fuselm.cli import main as cli
from fuselm.system import library_output, processes, progress
progress.SECONDS_OF_SILENCE = 3600.0
atexit.register(lambda: open(os.environ["LOADED"], "w").write(" ".join(m for m in {WATCHED} if m in sys.modules)))
cli.main()
"""


def fuselm_apart(*arguments: object, folder: Path) -> Outcome:
    """Run a command in a process of its own, as a user does; `loaded` are those of `WATCHED` that it imported."""
    environment = os.environ | {"LOADED": str(folder / "loaded"), "COLUMNS": "211"}
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    loaded = tuple((folder / "loaded").read_text().split())
    return Outcome(code=ended.returncode, out=ended.stdout, err=ended.stderr, loaded=loaded)


def start(*arguments: object) -> BaseProcess:
    """Start a command in a process that may be killed; it begins quickly and writes a block for each batch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fuselm.training.target_training", "fuselm.results.report", "fuselm.alignment.aligner", "tiny_run"]
    )
    process = context.Process(target=_child, args=(list(map(str, arguments)), dict(os.environ)), daemon=True)
    process.start()
    return process


def capture_watched(run_file: Path, out: Path, *, stop_after: float = math.inf, then: float = 0.0) -> int | None:
    """Return how many files a capture made until it ended, or None if it was killed.

    It is killed some seconds after it made so many.
    """
    names, before = set[str](), set(os.listdir(partial)) if (partial := _partial(out)) else set[str]()
    process = start("capture", run_file, f"output={out}")
    while process.exitcode is None and len(names) <= stop_after:
        with contextlib.suppress(FileNotFoundError):
            names |= set(os.listdir(partial)) - before if (partial := _partial(out)) else set()
        time.sleep(0.002)
    process.join(then if len(names) > stop_after else None)
    killed = process.exitcode is None
    process.kill()
    process.join()
    assert killed or process.exitcode == 0
    return None if killed else len(names)


def _partial(out: Path) -> Path | None:
    return next(out.glob("capture/*.partial"), None)


def kill(run_file: Path, out: Path, *, kills: int, files: int) -> int:
    """Kill a capture at a random moment, again and again, then let it end; return how many were killed.

    A capture makes so many files.
    """
    moments, killed = random.Random(0), 0
    while killed < kills:
        after, then = int(moments.uniform(-0.3, 1) * files / kills), moments.uniform(0, 0.03)
        if capture_watched(run_file, out, stop_after=after, then=then) is not None:
            break
        killed += 1
    capture_watched(run_file, out)
    return killed


def _child(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    resumable_writing.SECONDS_PER_BLOCK = 0
    outcome = fuselm(*arguments)
    sys.exit(outcome.code)


def summary(out: Path) -> dict:
    """Return a run's numbers, except the seconds it took."""
    numbers = json.loads((out / "summary.json").read_text())
    del numbers["stages"]
    return numbers


def captured(out: Path) -> dict[str, list[str]]:
    """Return the documents in each source's finished store, as often as they are there."""
    return {
        folder.name.rpartition("-")[0]: [
            document
            for part in sorted(folder.glob("part-*.parquet"))
            for document in pq.read_table(part, columns=["document"])[0].to_pylist()
        ]
        for folder in sorted((out / "capture").iterdir())
    }


def files(out: Path, stage: str) -> dict[str, int]:
    """Return the time of every file of a stage."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in (out / stage).rglob("*") if p.is_file()}
