"""Say at each step of a run which one it is, of how many, and about how long the rest of the run takes.

The seconds of each step are those that `fuselm plan` measured on this machine, if it was asked. Otherwise they are
guessed from the tokens and the size of the models, and what the steps so far have taken corrects the guess.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.system import atomic_files
from fuselm.system.durations import format_duration

if TYPE_CHECKING:
    from fuselm.runs.estimates import Estimate
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

FILE = ".plan.json"  # in the run's folder: the seconds of each step, of the last plan
GUESSED_BYTES = 3e11  # a second: bytes of weights x tokens that a machine of two cores reads
TRAINING_COST = 3.0  # of a token, in times of reading it
STEP_SECONDS, TOKEN_SECONDS = 3.0, 1e-5  # of loading a model; of a token that is aligned or fused


class RemainingTime:
    """Hold how long the steps of a run take, and count them as they are made."""

    def __init__(self, seconds: Mapping[Path, float], *, is_measured: bool):
        self._waiting = dict(seconds)
        self._total = len(seconds)
        self._is_measured = is_measured
        self._expected = self._taken = 0.0

    def describe(self, folder: Path) -> str:
        """Return which step this is, and the time that is left with it; empty if it was not foreseen."""
        if folder not in self._waiting or self._total < 2:
            return ""
        number = f"{self._total - len(self._waiting) + 1} of {self._total}"
        left = sum(self._waiting.values())
        if self._expected:
            left *= self._taken / self._expected
        elif not self._is_measured:
            return number
        return f"{number}, about {format_duration(max(left, 1.0), decimals=0)} left"

    def count(self, folder: Path, seconds: float) -> None:
        """Note that a step is done, and how long it took."""
        if (expected := self._waiting.pop(folder, None)) is not None:
            self._expected += expected
            self._taken += seconds


def foresee(pipeline: "Pipeline", steps: "Sequence[Step]") -> RemainingTime:
    """Return the time of the steps that are needed, by the last plan if it has all of them, else by a guess."""
    from fuselm.runs import plan

    if not (needed := [step for step in steps if step.is_needed]):
        return RemainingTime({}, is_measured=False)
    try:
        planned = json.loads((pipeline.folder / FILE).read_bytes())
        measured = {step.folder: float(planned[step.folder.name]) for step in needed}
        return RemainingTime(measured, is_measured=True)
    except (OSError, ValueError, LookupError, TypeError):
        rows = plan.estimate(pipeline, needed)
        guessed = {step.folder: _guess_seconds(pipeline, step, row) for step, row in zip(needed, rows, strict=True)}
        return RemainingTime(guessed, is_measured=False)


def keep_plan(folder: Path, steps: "Sequence[Step]", rows: "Sequence[Estimate]") -> None:
    """Keep the seconds that a plan found for the steps of a run; nothing if some could not be tried."""
    if all(row.seconds is not None for row in rows):
        seconds = {step.folder.name: row.seconds for step, row in zip(steps, rows, strict=False)}
        atomic_files.write_text(folder / FILE, json.dumps(seconds))


def _guess_seconds(pipeline: "Pipeline", step: "Step", row: "Estimate") -> float:
    stage = step.stage
    if not stage.loads_models:
        return 1.0 + row.tokens * TOKEN_SECONDS
    model = pipeline.inputs.sources.get(step.name, pipeline.inputs.target)
    size = getattr(model, "parameters_bytes", 0)
    return STEP_SECONDS + row.tokens * size * (TRAINING_COST if stage.trains else 1.0) / GUESSED_BYTES
