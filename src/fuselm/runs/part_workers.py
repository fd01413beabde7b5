"""Start processes of this machine that make parts of a run's stages beside the one that the user started.

A worker opens the same run, and is told which folders are being made. It claims parts of them as every process does
(part_work.py), so it may end at any moment, and ends when the process that started it does.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fuselm.system import machine, processes
from fuselm.system.remote_paths import open_path

if TYPE_CHECKING:
    from fuselm.runs.config import RunOptions
    from fuselm.runs.stage import Stage

COMMAND = ("-m", "fuselm.runs.part_workers")  # of Python
SECONDS_OF_IDLENESS = 60.0  # after which a worker ends
BYTES_PER_WORKER = 12 << 20  # of text, one for each source; with less, starting a worker takes longer than it saves


class PartWorkers:
    """Hold the processes that help with a run; none is started before a stage pays for it."""

    def __init__(self, run: "RunOptions", precision_file: Path):
        self._run, self._precision_file = run, precision_file
        self._workers: list[subprocess.Popen[str]] = []
        weakref.finalize(self, _end, self._workers)

    def help(self, stage: "Stage", folder: Path, size: int) -> None:
        """Let workers make parts of a folder, if that pays for `size` bytes of text."""
        count = self._choose_count(stage, size)
        for number, worker in enumerate(self._workers):
            if worker.poll() is not None:  # it had nothing to do for a while
                self._workers[number] = self._start(number + 1, count)
        while len(self._workers) < count - 1:
            self._workers.append(self._start(len(self._workers) + 1, count))
        for worker in self._workers[: count - 1]:
            with contextlib.suppress(OSError):  # it has ended; then others make its parts
                _send(worker, {"stage": stage.name, "folder": str(folder)})

    def _choose_count(self, stage: "Stage", size: int) -> int:
        """Return how many processes are to make a folder, this one included."""
        if processes.world_size() > 1:
            return 1  # the ranks are the workers
        if self._run.processes is not None:
            return self._run.processes
        if not stage.is_on_cpu:
            return 1
        paid = size * len(self._run.sources) // BYTES_PER_WORKER
        return min(machine.count_free_cores(), paid) if paid > 1 else 1

    def _start(self, number: int, count: int) -> "subprocess.Popen[str]":
        environment = dict(os.environ)
        if not any(os.environ.get(name) for name in machine.THREAD_VARIABLES):
            environment["OMP_NUM_THREADS"] = str(max(machine.count_usable_cores() // count, 1))
        if gpus := _list_gpus():
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        worker = subprocess.Popen(
            [sys.executable, *COMMAND], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True
        )
        run = self._run.model_dump(mode="json")
        asked = {"run": run, "precision": str(self._precision_file), "number": number, "count": count}
        _send(worker, asked)
        return worker


def _end(workers: "list[subprocess.Popen[str]]") -> None:
    for worker in workers:
        worker.kill()
        worker.communicate()


def _list_gpus() -> list[str]:
    """Return the GPUs of this process, where torch is loaded because a stage needs it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def _send(worker: "subprocess.Popen[str]", row: dict) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(row) + "\n")
    worker.stdin.flush()


def work(lines: IO[str]) -> None:
    """Make parts of the folders that are named on `lines`, after a first line with the run, until none comes."""
    asked = json.loads(lines.readline())
    folders: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, folders), daemon=True).start()
    from rich.console import Console

    from fuselm.runs.config import RunOptions
    from fuselm.runs.pipeline import Pipeline

    processes.set_worker(asked["number"], asked["count"])
    options = RunOptions.model_validate(asked["run"])
    pipeline = Pipeline(options, Console(quiet=True), precision_file=open_path(asked["precision"]))
    with contextlib.suppress(queue.Empty):
        while named := folders.get(timeout=SECONDS_OF_IDLENESS):
            pipeline.join(named["stage"], open_path(named["folder"]))


def _listen(lines: IO[str], folders: "queue.SimpleQueue[dict]") -> None:
    """Pass on what is named, and end the process when who started it has ended."""
    for line in lines:
        folders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    from fuselm.system.library_output import silence_libraries

    silence_libraries()
    work(sys.stdin)
