"""Make the stages of a run on a cluster of Ray, whose machines see the run's files and write parts themselves.

A worker opens the same run and claims parts as every process does (part_work.py). Nothing but names of folders goes
through the process that the user started. Where workers do not see the run's folder, it says so, and then a capture
hands them batches (sources/ray_workers.py), and the other stages are made here.
"""

import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.system import manifest
from fuselm.system.errors import summarize_error
from fuselm.system.part_work import list_done
from fuselm.system.progress import Progress
from fuselm.system.remote_paths import open_path

if TYPE_CHECKING:
    from fuselm.runs.config import RunOptions
    from fuselm.runs.stage import Stage

SECONDS_BETWEEN_LINES = 30.0
ANY_PARTS = 1 << 60


class RayRun:
    """Hold the workers of one run; none is started before a stage needs them."""

    def __init__(self, run: "RunOptions", precision_file: Path):
        self._run, self._precision_file = run, precision_file
        self._workers: list[Any] = []
        self._is_refused = False

    def make(self, stage: "Stage", folder: Path, shown: Progress, *, by_parts: bool) -> bool:
        """Let the workers make a folder `by_parts`, or one of them all of it, and wait. Tell whether they can.

        Raises `ValueError` if a worker fails other than by being killed.
        """
        if self._run.capture.engine != "ray" or self._is_refused:
            return False
        from fuselm.sources.ray_workers import find_cause, start_ray

        ray = start_ray(self._run.capture.process_count)
        try:
            if not self._workers and not self._start(ray, shown):
                return False
            asked = [worker.join.remote(stage.name, str(folder)) for worker in self._workers[: None if by_parts else 1]]
            noted, partial = time.monotonic(), folder.with_name(folder.name + ".partial")
            while asked:
                done, asked = ray.wait(asked, timeout=1.0)
                ray.get(done)
                if time.monotonic() - noted > SECONDS_BETWEEN_LINES:
                    noted = time.monotonic()
                    shown.note(f"{len(list_done(partial, ANY_PARTS))} parts are done")
        except ray.exceptions.RayError as error:
            raise ValueError(f"{stage.name}: a Ray worker failed ({find_cause(error)})") from error
        return manifest.is_finished(folder)

    def _start(self, ray: Any, shown: Progress) -> bool:
        """Start the workers, and tell whether all of them see the run."""
        count = self._run.capture.process_count
        gpus = int(ray.cluster_resources().get("GPU", 0) >= count)
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")
        output = open_path(self._run.output)
        probe = output / f".probe-{uuid.uuid4().hex[:16]}"
        probe.write_bytes(b"")
        try:
            local = self._run.capture.model_copy(update={"engine": "local", "workers": None})
            options = self._run.model_copy(update={"capture": local, "processes": 1}).model_dump(mode="json")
            asked = {"run": options, "precision": str(self._precision_file), "folder": os.getcwd()}
            workers = [kind(RayWorker).remote(asked, number, count) for number in range(count)]
            problems = ray.get([worker.open.remote(str(probe)) for worker in workers])
        finally:
            probe.unlink()
        if problem := next(filter(None, problems), None):
            shown.note(f"Ray's workers do not share this run's files ({problem}); what they make is sent here")
            self._is_refused = True
            for worker in workers:
                ray.kill(worker)
            return False
        self._workers = workers
        return True


class RayWorker:
    """Open a run in a worker process, and make parts of it."""

    def __init__(self, asked: dict[str, Any], number: int, count: int):
        self._asked, self._number, self._count = asked, number, count
        self._pipeline: Any = None

    def open(self, probe: str) -> str:
        """Open the run; return what is wrong, if it cannot be opened here."""
        try:
            os.chdir(self._asked["folder"])
            if not open_path(probe).exists():
                return f"{open_path(probe).parent} is another folder there"
            self._open()
        except (OSError, ValueError) as error:
            return summarize_error(error)
        return ""

    def join(self, stage: str, folder: str) -> None:
        """Make parts of a folder until it is finished."""
        if self._pipeline is None:  # it was killed, and started again
            os.chdir(self._asked["folder"])
            self._open()
        self._pipeline.join(stage, open_path(folder))

    def _open(self) -> None:
        from rich.console import Console

        from fuselm.runs.config import RunOptions
        from fuselm.runs.pipeline import Pipeline
        from fuselm.system import processes

        processes.set_worker(self._number, self._count)
        options = RunOptions.model_validate(self._asked["run"])
        self._pipeline = Pipeline(options, Console(quiet=True), precision_file=open_path(self._asked["precision"]))
