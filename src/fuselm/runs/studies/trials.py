"""Run a study: train every trial of every arm, score the best by the development split, and drop the rest.

Stage folders are keyed by their recipes, so what arms have in common is made once, and a study that was cut off
resumes. Nothing else is remembered: what is done is what is there.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from fuselm.documents.document import SPLITS
from fuselm.documents.document_list import DocumentList, read_documents
from fuselm.results.pages.formats import describe_settings
from fuselm.runs import config, plan, reuse, run_precision, step_records
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import capture, evaluate, merge, tasks, train, write
from fuselm.runs.steps import Step
from fuselm.runs.studies import answer_copies
from fuselm.runs.studies.study import Arm, Study
from fuselm.system import manifest
from fuselm.system.durations import format_duration
from fuselm.system.foreign_text import put_on_one_line
from fuselm.system.terminal import make_plain_text
from fuselm.training.choices import METHODS

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Hold one training of an arm. A model as it is has one trial without training."""

    settings: Mapping[str, Any]
    run: config.RunOptions
    given_tokens: int  # of training text in the target's tokens, without what sources write
    written: Mapping[str, float]  # bytes that each source writes for one byte of training text
    steps: Sequence[Step]

    @property
    def training_step(self) -> Step | None:
        """Return the step that makes the trained model, the merge where there is one; None for a model as it is."""
        return next((step for step in reversed(self.steps) if step.stage in (train.STAGE, merge.STAGE)), None)

    @property
    def scoring_step(self) -> Step:
        """Return the step that scores the model on held-out text."""
        return next(step for step in self.steps if step.stage is evaluate.STAGE)

    @property
    def task_steps(self) -> list[Step]:
        """Return the steps that ask the model tasks."""
        return [step for step in self.steps if step.stage is tasks.STAGE]

    @property
    def dev_bits_per_byte(self) -> float | None:
        """Return the best score on the development split, or None before the trial is trained."""
        if self.training_step is None or not self.training_step.done:
            return None
        return manifest.read(self.training_step.folder)["counts"]["dev_bits_per_byte"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Hold how far an arm is, for one seed."""

    arm: Arm
    seed: int
    trials: Sequence[Trial]

    @property
    def best_trial(self) -> Trial | None:
        """Return the trial that is best on the development split, or None before all are trained."""
        if self.arm.method is None:
            return self.trials[0]
        scores = [trial.dev_bits_per_byte for trial in self.trials]
        known = [score for score in scores if score is not None]
        return self.trials[scores.index(min(known))] if len(known) == len(scores) else None

    @property
    def is_measured(self) -> bool:
        """Tell whether the best trial has its scores, and was asked all tasks."""
        return self.scores_folder is not None and len(self.answers_folders) == len(self.trials[0].task_steps)

    @property
    def answers_folders(self) -> list[Path]:
        """Return the folders of what the best trial answered, as far as they are there."""
        asked = [] if self.best_trial is None else self.best_trial.task_steps
        return [step.folder for step in asked if step.done]

    @property
    def scores_folder(self) -> Path | None:
        """Return the folder of the best trial's scores, or None before it has any."""
        return (
            self.best_trial.scoring_step.folder
            if self.best_trial is not None and self.best_trial.scoring_step.done
            else None
        )


class Grid:
    """Hold the arms of a study, each for its seeds."""

    def __init__(self, study: Study, console: Console):
        self.study = study
        self.console = console
        self._dry_pipelines: dict[tuple[str, int, int], Pipeline] = {}  # only look, so they hold no text

    def iterate_arms(self) -> Iterator[tuple[int, Arm]]:
        """Yield (seed, arm): all arms of one seed before any of the next."""
        arms = self.study.arms.values()
        for seed in dict.fromkeys(seed for arm in arms for seed in arm.seeds):
            yield from ((seed, arm) for arm in arms if seed in arm.seeds)

    def check(self) -> None:
        """Read the inputs of every trial. Raises `ValueError` if any of them cannot be used."""
        for seed, arm in self.iterate_arms():
            for number in range(len(arm.trials)):
                self.open_once(arm, seed, number)

    def check_texts(self) -> None:
        """Make all corpora, and check that arms of the same seed have the same development and held-out text.

        Raises:
            ValueError: If two arms differ.
        """
        first: dict[int, tuple[str, Path, DocumentList]] = {}
        for seed, arm in self.iterate_arms():
            for folder in dict.fromkeys(self.open_once(arm, seed, n).make_corpus() for n in range(len(arm.trials))):
                if seed in first and folder == first[seed][1]:
                    continue
                documents = read_documents(folder)
                not_trained_on = documents.take(documents.splits != SPLITS.index("train"))
                name, _, expected = first.setdefault(seed, (arm.name, folder, not_trained_on))
                if not_trained_on != expected:
                    raise ValueError(
                        f"{self.study.file}: arms.{arm.name}, seed {seed}: holds out different text from "
                        f"'{name}'; an arm may only add rows whose `split` is train, in files after those that all "
                        "arms have; if a source has a short context, also set corpus.max_bytes in the study's `set`"
                    )

    def check_needs(self, arm: Arm, seed: int) -> None:
        """Try the servers and what training needs. Raises `ValueError` if something cannot do what is asked of it."""
        for number in range(len(arm.trials)):
            pipeline = self.open_once(arm, seed, number)
            try:
                pipeline.check(tasks.STAGE.name, _build_scores(arm))
            except ValueError as error:
                raise ValueError(f"{self.study.file}: arms.{arm.name}: {error}") from None

    def record_steps(self) -> None:
        """Record for each seed what its arms need, so that nothing of that is deleted before the study is finished."""
        steps: dict[Path, list[Step]] = {}
        for seed, arm in self.iterate_arms():
            pipeline = self.open_once(arm, seed, 0)
            steps.setdefault(pipeline.folder, []).extend(s for t in self.read_state(arm, seed).trials for s in t.steps)
            pipeline.places.register()
        for folder, found in steps.items():
            step_records.write_steps(folder, found, file=step_records.STUDY_FILE)

    def open_once(self, arm: Arm, seed: int, trial: int) -> Pipeline:
        cell = (arm.name, seed, trial)
        if cell not in self._dry_pipelines:
            try:
                self._dry_pipelines[cell] = self.open_pipeline(arm, seed, trial)
            except ValueError as error:
                where = f"arms.{arm.name}: " if arm.method else ""
                raise ValueError(f"{self.study.file}: {where}{error}") from None
        return self._dry_pipelines[cell]

    def open_pipeline(self, arm: Arm, seed: int, trial: int) -> Pipeline:
        run = self.study.run_options(arm, seed, arm.trials[trial])
        return Pipeline(run, self.console, precision_file=self.study.output / run_precision.FILE)

    def read_state(self, arm: Arm, seed: int) -> State:
        """Return how far an arm is. Makes the corpus and nothing else."""
        trials = []
        for number, settings in enumerate(arm.trials):
            pipeline = self.open_once(arm, seed, number)
            steps = pipeline.dry_run(_build_scores(arm))
            counted = manifest.read(pipeline.make_corpus())["counts"]["tokens"]
            trial = Trial(
                settings=settings,
                run=pipeline.run,
                given_tokens=counted[pipeline.inputs.target.tokenizer_fingerprint]["train"],
                written={name: write.compute_written_ratio(pipeline, name) for name in write.list_steps(pipeline)},
                steps=steps,
            )
            trials.append(trial)
        return State(arm=arm, seed=seed, trials=trials)


def _build_scores(arm: Arm) -> Callable[[Pipeline], object]:
    """Return a function that makes the scores of an arm, for a dry run."""

    def measure(pipeline: Pipeline) -> None:
        pipeline.evaluate_model(arm.method or arm.name)
        pipeline.ask_model(arm.method or arm.name)

    return measure


def make_output_folder(study: Study) -> None:
    """Make the study's folder. Raises `ValueError` if it cannot be written to."""
    try:
        study.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{study.output}: cannot write there ({error.strerror}); set another `output`") from None


def run_study(grid: Grid, after_arm: Callable[[], None]) -> list[str]:
    """Train and score every arm that has no scores yet, and call `after_arm` after each.

    What training and servers need is tried before the first arm. An arm that fails is skipped; the result has one line
    about each of those.

    Raises:
        ValueError: If training or a server lacks something.
    """
    failed = []
    grid.record_steps()
    for seed, arm in grid.iterate_arms():
        if not grid.read_state(arm, seed).is_measured:
            grid.check_needs(arm, seed)
    for seed, arm in grid.iterate_arms():
        if grid.read_state(arm, seed).is_measured:
            continue
        same_seed = [a for s, a in grid.iterate_arms() if s == seed]
        title = f"arm {same_seed.index(arm) + 1} of {len(same_seed)}, seed {seed}: {arm.name}"
        grid.console.print()
        grid.console.print(make_plain_text(title, style="bold"))
        try:
            _make_arm(grid, arm, seed)
        except ValueError as error:
            failed.append(f"{arm.name}, seed {seed}: {error}")
            grid.console.print(make_plain_text(f"failed: {put_on_one_line(str(error))}", style="red"), soft_wrap=True)
            continue
        _drop_weights(grid, seed)
        after_arm()
    return failed


def _make_arm(grid: Grid, arm: Arm, seed: int) -> None:
    for number, trial in enumerate(grid.read_state(arm, seed).trials):
        if arm.method is None or (trial.training_step is not None and trial.training_step.done):
            continue
        pipeline = grid.open_pipeline(arm, seed, number)
        plan.check_disk(pipeline, trial.steps)
        if len(arm.trials) > 1:
            title = f"trial {number + 1} of {len(arm.trials)}: {describe_settings(trial.settings)}"
            grid.console.print(make_plain_text(title), soft_wrap=True)
        pipeline.train_method(arm.method, needs_weights=False)
        gc.collect()  # a trainer holds itself, and with it the weights and their moments
    state = grid.read_state(arm, seed)
    assert state.best_trial is not None
    answer_copies.take_answers(grid.study.output, state.best_trial.task_steps)
    _build_scores(arm)(grid.open_pipeline(arm, seed, state.trials.index(state.best_trial)))
    gc.collect()


def _drop_weights(grid: Grid, seed: int) -> None:
    """Delete the weights of all trials except those that an arm without scores may need. Their numbers stay."""
    needed, present = set(), set()
    for arm_seed, arm in grid.iterate_arms():
        if arm_seed != seed or arm.method is None:
            continue
        state = grid.read_state(arm, seed)
        steps = [step for trial in state.trials for step in trial.steps]
        folders = {step.folder for step in steps if step.stage in (train.STAGE, merge.STAGE)}
        present |= folders
        if not state.is_measured:
            needed |= folders
    for folder in present - needed:
        train.drop_weights(folder)


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

        key = arm.name, seed, state.trials.index(trial)
        if key not in self._by_trial:
            earlier = next(iter(self._by_trial.values()), None)
            self._by_trial[key] = Calibration(self._grid.open_pipeline(arm, seed, key[2]), earlier)
        calibration = self._by_trial[key]
        counts = manifest.read(calibration.pipeline.make_corpus())["counts"]["tokens"]
        row = step.stage.estimate(calibration.pipeline, step, counts)
        return step.stage.calibrate(calibration, step, row).seconds


def explain_captures(grid: Grid) -> list[str]:
    """Return a line for each source and seed that has to be captured: why no capture that is there can be used."""
    lines: dict[Path, str] = {}
    for seed, arm in grid.iterate_arms():
        state = grid.read_state(arm, seed)
        for number, trial in enumerate(() if state.is_measured else state.trials):
            missing = [s for s in trial.steps if s.is_needed and s.stage is capture.STAGE and s.folder not in lines]
            pipeline = grid.open_once(arm, seed, number)
            explained = reuse.explain_captures(pipeline, missing) if missing else []
            lines |= {step.folder: f"seed {seed}, {line}" for step, line in zip(missing, explained, strict=True)}
    return list(lines.values())


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
