"""Show what of a study is done and what is left, with the time that it should take."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from fuselm.runs import config
from fuselm.runs.stages import evaluate, tasks, train
from fuselm.runs.steps import Step
from fuselm.runs.studies.study import Arm
from fuselm.runs.studies.trials import Grid, State, Trial
from fuselm.system import manifest
from fuselm.system.durations import format_duration
from fuselm.system.terminal import make_plain_text
from fuselm.training.choices import METHODS

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration


def draw_progress(grid: Grid) -> Table:
    """Return a table of what is done and what is left, with the time that it should take.

    Steps take the time of such steps so far. If there are none yet, one batch of their work is measured.
    """
    rows = [(seed, arm, grid.read_state(arm, seed)) for seed, arm in grid.iterate_arms()]
    speed = _measure_speeds(rows)
    result = Table("seed", "arm", Column("trials", justify="right"), "state", Column("left", justify="right"))
    calibrations = Calibrations(grid)
    planned: set[Path] = set()
    total, unknown = 0.0, 0
    for seed, arm, state in rows:
        trial_steps = [
            (step, trial)
            for trial in state.trials
            for step in trial.steps
            if step.stage not in (evaluate.STAGE, tasks.STAGE)
        ]
        scored = state.best_trial or state.trials[0]
        measuring = [(step, scored) for step in (scored.scoring_step, *scored.task_steps)]
        makes = [] if state.is_measured else [*trial_steps, *measuring]
        left = {s.folder: (s, t) for s, t in makes if s.is_needed and s.folder not in planned}
        planned |= left.keys()
        times = [
            _estimate_seconds(step, trial, speed) or calibrations.estimate_seconds(arm, seed, state, trial, step)
            for step, trial in left.values()
        ]
        known = sum(t for t in times if t is not None)
        unknown += None in times
        total += known
        trained = sum(t.training_step is not None and t.training_step.done for t in state.trials)
        done = "done" if state.is_measured else f"{trained} trained" if trained else "to do"
        time = "" if not times else "unknown" if None in times else format_duration(known)
        result.add_row(str(seed), make_plain_text(arm.name), str(len(state.trials)) if arm.method else "", done, time)
    result.add_section()
    count = f"{sum(state.is_measured for _, _, state in rows)} of {len(rows)} done"
    result.add_row("", "in all", "", count, format_duration(total) + (" without what is unknown" if unknown else ""))
    if calibrations.failures:
        result.caption = f"unknown: {calibrations.failures[0]}"
    return result


class Calibrations:
    """Estimate steps by measuring one batch of their work. Trials share what is measured."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._by_trial: dict[tuple[str, int, int], "Calibration"] = {}

    @property
    def failures(self) -> list[str]:
        """Return why some work could not be tried, one line each."""
        return [line for calibration in list(self._by_trial.values())[:1] for line in calibration.failures]

    def estimate_seconds(self, arm: Arm, seed: int, state: State, trial: Trial, step: Step) -> float | None:
        """Return the seconds that a step should take; None if that cannot be tried."""
        from fuselm.runs.calibration import Calibration

        key = arm.name, seed, trial.number
        if key not in self._by_trial:
            earlier = next(iter(self._by_trial.values()), None)
            self._by_trial[key] = Calibration(self._grid.open_pipeline(arm, seed, key[2]), earlier)
        calibration = self._by_trial[key]
        counts = manifest.read(calibration.pipeline.make_corpus())["counts"]["tokens"]
        row = step.stage.estimate(calibration.pipeline, step, counts)
        return step.stage.calibrate(calibration, step, row).seconds


def _measure_speeds(rows: Sequence[tuple[int, Arm, State]]) -> dict[str, list[float]]:
    """Return the seconds for each token of steps that are done, by `_name_kind`."""
    speeds: dict[str, list[float]] = {}
    seen = {}
    for _, _, state in rows:
        for trial in state.trials:
            seen |= {step.folder: (step, trial) for step in trial.steps if step.done}
    for step, trial in seen.values():
        seconds = float(manifest.read(step.folder)["seconds"])
        speeds.setdefault(_name_kind(step), []).append(seconds / _count_work(step, trial))
    return speeds


def _count_work(step: Step, trial: Trial) -> float:
    """Return the tokens of training text that a step reads or writes; 1 where its time does not depend on them."""
    passes = step.stage.count_passes(trial.run, step.name, trial.written)
    return 1.0 if passes is None else float(trial.given_tokens) * passes


def _name_kind(step: Step) -> str:
    """Name the steps that are equally fast. Trained models are all of one size, whatever they were trained on."""
    if step.stage is evaluate.STAGE and step.name in METHODS:
        return "evaluate target"
    name = config.FUSED if step.stage is train.STAGE and step.name != "clm" else step.name
    return f"{step.stage.name} {name}"


def _estimate_seconds(step: Step, trial: Trial, speeds: Mapping[str, list[float]]) -> float | None:
    measured = speeds.get(_name_kind(step))
    return None if measured is None else statistics.median(measured) * _count_work(step, trial)
