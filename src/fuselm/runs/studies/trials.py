"""Run a study: train every trial of every arm, score the best by the development split, and drop the rest.

Stage folders are keyed by their recipes, so what arms have in common is made once, and a study that was cut off goes on
where it was. Nothing else is remembered: what is done is what is there.
"""

import gc
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fuselm.documents import corpus
from fuselm.documents.corpus import Document
from fuselm.results.pages.formats import describe_settings
from fuselm.runs import config, plan, run_precision
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import evaluate, train, write
from fuselm.runs.steps import Step
from fuselm.runs.studies.study import Arm, Study
from fuselm.system import manifest
from fuselm.system.durations import format_duration
from fuselm.system.foreign_text import put_on_one_line
from fuselm.system.terminal import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Hold one training of an arm; a model as it is has one, without training."""

    settings: Mapping[str, Any]
    run: config.RunOptions
    given_tokens: int  # of the training text, for the target, without what sources write
    written: Mapping[str, float]  # by each source, for each byte of the training text
    steps: Sequence[Step]

    @property
    def trained(self) -> Step | None:
        return next((step for step in self.steps if step.stage is train.STAGE), None)

    @property
    def scored(self) -> Step:
        return next(step for step in self.steps if step.stage is evaluate.STAGE)

    @property
    def dev_bits_per_byte(self) -> float | None:
        """None before it is trained."""
        if self.trained is None or not self.trained.done:
            return None
        return manifest.read(self.trained.folder)["counts"]["dev_bits_per_byte"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Hold how far an arm is, for one seed."""

    arm: Arm
    seed: int
    trials: Sequence[Trial]

    @property
    def best(self) -> Trial | None:
        """Once all are trained."""
        if self.arm.method is None:
            return self.trials[0]
        scores = [trial.dev_bits_per_byte for trial in self.trials]
        known = [score for score in scores if score is not None]
        return self.trials[scores.index(min(known))] if len(known) == len(scores) else None

    @property
    def scores(self) -> Path | None:
        """Folder of the best one's scores, once it has some."""
        return self.best.scored.folder if self.best is not None and self.best.scored.done else None


class Grid:
    """Hold the cells of a study: arms by seed."""

    def __init__(self, study: Study, console: Console):
        self.study = study
        self.console = console
        self._looking: dict[tuple[str, int, int], Pipeline] = {}  # never to make anything, and so without any text

    def cells(self) -> Iterator[tuple[int, Arm]]:
        """Yield all arms of one seed before any of the next."""
        arms = self.study.arms.values()
        for seed in dict.fromkeys(seed for arm in arms for seed in arm.seeds):
            yield from ((seed, arm) for arm in arms if seed in arm.seeds)

    def check(self) -> None:
        """Look at what every trial is made of. Raises `ValueError` on what can't be used."""
        for seed, arm in self.cells():
            for number in range(len(arm.trials)):
                self._look(arm, seed, number)

    def check_texts(self) -> None:
        """Check that all arms of a seed choose and are scored by the same text; only corpora are made.

        Raises:
            ValueError: If they are not.
        """
        first: dict[int, tuple[str, Path, list[Document]]] = {}
        for seed, arm in self.cells():
            for folder in dict.fromkeys(self._look(arm, seed, n).make_corpus() for n in range(len(arm.trials))):
                if seed in first and folder == first[seed][1]:
                    continue
                apart = [d for d in corpus.read_documents(folder) if d.split != "train"]
                name, _, expected = first.setdefault(seed, (arm.name, folder, apart))
                if apart != expected:
                    raise ValueError(
                        f"{self.study.file}: arms.{arm.name}, seed {seed}: holds out other text than "
                        f"'{name}'; corpus.files may add lines whose `split` is train, behind the files of all, and "
                        "where a source reads less at a time, corpus.max_bytes in the study's `set` cuts all texts so"
                    )

    def try_needs(self, arm: Arm, seed: int) -> None:
        """Servers, and what training takes. Raises `ValueError` on what can't do what is asked of it."""
        for number in range(len(arm.trials)):
            pipeline = self._look(arm, seed, number)
            try:
                pipeline.check(evaluate.STAGE.name, _build_of(arm))
            except ValueError as error:
                raise ValueError(f"{self.study.file}: arms.{arm.name}: {error}") from None

    def _look(self, arm: Arm, seed: int, trial: int) -> Pipeline:
        cell = (arm.name, seed, trial)
        if cell not in self._looking:
            try:
                self._looking[cell] = self.pipeline(arm, seed, trial)
            except ValueError as error:
                where = f"arms.{arm.name}: " if arm.method else ""
                raise ValueError(f"{self.study.file}: {where}{error}") from None
        return self._looking[cell]

    def pipeline(self, arm: Arm, seed: int, trial: int) -> Pipeline:
        run = self.study.run_options(arm, seed, arm.trials[trial])
        return Pipeline(run, self.console, precision_file=self.study.output / run_precision.FILE)

    def state(self, arm: Arm, seed: int) -> State:
        """Return how far an arm is; nothing is made except the corpus."""
        trials = []
        for number, settings in enumerate(arm.trials):
            pipeline = self._look(arm, seed, number)
            steps = pipeline.dry_run(_build_of(arm))
            counted = manifest.read(pipeline.make_corpus())["counts"]["tokens"]
            trial = Trial(
                settings=settings,
                run=pipeline.run,
                given_tokens=counted[pipeline.inputs.target.tokenizer_fingerprint]["train"],
                written={name: write.compute_written_ratio(pipeline, name) for name in pipeline.inputs.writers},
                steps=steps,
            )
            trials.append(trial)
        return State(arm=arm, seed=seed, trials=trials)


def _build_of(arm: Arm) -> Callable[[Pipeline], object]:
    """Return what makes the scores of an arm."""
    return lambda pipeline: pipeline.evaluate_model(arm.method or arm.name)


def make_output_folder(study: Study) -> None:
    """Raise `ValueError` if the study's folder can't be written to."""
    try:
        study.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{study.output}: cannot write there ({error.strerror}); set another `output`") from None


def run_study(grid: Grid, after_arm: Callable[[], None]) -> list[str]:
    """Make what is not there yet, and call `after` each arm that something was made of.

    An arm that fails is skipped; return a line about each of those. All texts are made first, and what training needs
    is tried.

    Raises:
        ValueError: If something cannot be done.
    """
    failed = []
    for seed, arm in grid.cells():
        if grid.state(arm, seed).scores is None:
            grid.try_needs(arm, seed)
    for seed, arm in grid.cells():
        if grid.state(arm, seed).scores is not None:
            continue
        of_seed = [a for s, a in grid.cells() if s == seed]
        title = f"arm {of_seed.index(arm) + 1} of {len(of_seed)}, seed {seed}: {arm.name}"
        grid.console.print()
        grid.console.print(plain(title, style="bold"))
        try:
            _make(grid, arm, seed)
        except ValueError as error:
            failed.append(f"{arm.name}, seed {seed}: {error}")
            grid.console.print(plain(f"failed: {put_on_one_line(str(error))}", style="red"), soft_wrap=True)
            continue
        _drop_weights(grid, seed)
        after_arm()
    return failed


def _make(grid: Grid, arm: Arm, seed: int) -> None:
    for number, trial in enumerate(grid.state(arm, seed).trials):
        if arm.method is None or (trial.trained is not None and trial.trained.done):
            continue
        pipeline = grid.pipeline(arm, seed, number)
        plan.check_disk(pipeline, trial.steps)
        if len(arm.trials) > 1:
            of = f"trial {number + 1} of {len(arm.trials)}: {describe_settings(trial.settings)}"
            grid.console.print(plain(of), soft_wrap=True)
        pipeline.train_method(arm.method, needs_weights=False)
        gc.collect()  # a trainer holds itself, and with it the weights and their moments
    now = grid.state(arm, seed)
    assert now.best is not None
    grid.pipeline(arm, seed, now.trials.index(now.best)).evaluate_model(arm.method or arm.name)
    gc.collect()


def _drop_weights(grid: Grid, seed: int) -> None:
    """Drop the weights of all trials, except those that an arm without scores may need; numbers stay."""
    needed, there = set(), set()
    for of_seed, arm in grid.cells():
        if of_seed != seed or arm.method is None:
            continue
        now = grid.state(arm, seed)
        folders = {trial.trained.folder for trial in now.trials if trial.trained is not None}
        there |= folders
        if now.scores is None:
            needed |= folders
    for folder in there - needed:
        gone = folder / ".dropped"
        shutil.rmtree(gone, ignore_errors=True)
        if (folder / train.WEIGHTS).is_dir():
            (folder / train.WEIGHTS).rename(gone)  # whole or not at all
            shutil.rmtree(gone)


def draw_progress(grid: Grid) -> Table:
    """Say what is done and what is left, with the time it should take, from how long such steps took so far."""
    cells = [(seed, arm, grid.state(arm, seed)) for seed, arm in grid.cells()]
    speed = _speeds(cells)
    result = Table("seed", "arm", Column("trials", justify="right"), "state", Column("left", justify="right"))
    planned: set[Path] = set()
    total, unknown = 0.0, 0
    for seed, arm, now in cells:
        of_trials = [(step, trial) for trial in now.trials for step in trial.steps if step.stage is not evaluate.STAGE]
        scored = now.best or now.trials[0]
        makes = [*of_trials, (scored.scored, scored)] if now.scores is None else []
        left = {s.folder: (s, t) for s, t in makes if not s.done and s.folder not in planned}
        planned |= left.keys()
        times = [_seconds(step, trial, speed) for step, trial in left.values()]
        known = sum(t for t in times if t is not None)
        unknown += None in times
        total += known
        trained = sum(t.trained is not None and t.trained.done for t in now.trials)
        done = "done" if now.scores is not None else f"{trained} trained" if trained else ""
        time = "" if not times else "unknown" if None in times else format_duration(known)
        result.add_row(str(seed), plain(arm.name), str(len(now.trials)) if arm.method else "", done, time)
    result.add_section()
    count = f"{sum(now.scores is not None for _, _, now in cells)} of {len(cells)} done"
    result.add_row("", "in all", "", count, format_duration(total) + (" and what is unknown" if unknown else ""))
    return result


def _speeds(cells: Sequence[tuple[int, Arm, State]]) -> dict[str, list[float]]:
    """Seconds of steps that are done, by what they are, for each token that they read."""
    speeds: dict[str, list[float]] = {}
    seen = {}
    for _, _, now in cells:
        for trial in now.trials:
            seen |= {step.folder: (step, trial) for step in trial.steps if step.done}
    for step, trial in seen.values():
        seconds = float(manifest.read(step.folder)["seconds"])
        speeds.setdefault(_kind(step), []).append(seconds / _work(step, trial))
    return speeds


def _work(step: Step, trial: Trial) -> float:
    """Return the tokens of training text that a step reads or writes; 1 where its time does not depend on them."""
    passes = step.stage.count_passes(trial.run, step.name, trial.written)
    return 1.0 if passes is None else float(trial.given_tokens) * passes


def _kind(step: Step) -> str:
    """Name the steps that are equally fast. Trained models are all of one size, whatever they were trained on."""
    if step.stage is evaluate.STAGE and step.name in train.METHODS:
        return "evaluate target"
    return f"{step.stage.name} {step.name}"


def _seconds(step: Step, trial: Trial, speeds: Mapping[str, list[float]]) -> float | None:
    measured = speeds.get(_kind(step))
    return None if measured is None else statistics.median(measured) * _work(step, trial)
