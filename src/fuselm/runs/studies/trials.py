"""Run a study: train every trial of every arm, score the best by the development split, and drop the rest.

Stage folders are keyed by their recipes, so what arms have in common is made once, and a study that was cut off
resumes. Nothing else is remembered: what is done is what is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

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
from fuselm.system.foreign_text import put_on_one_line
from fuselm.system.terminal import make_plain_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Hold one training of an arm. A model as it is has one trial without training."""

    number: int  # among the arm's trials
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
    awaits_choice: bool = False  # another seed has to choose first, and the trial here stands for the one to come

    @property
    def best_trial(self) -> Trial | None:
        """Return the trial that is best on the development split, or None before all are trained."""
        if self.arm.method is None:
            return self.trials[0]
        if self.awaits_choice:
            return None
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
        """Yield (seed, arm): all arms of one seed before any of the next, first the seeds that choose for others."""
        arms = self.study.arms.values()
        choosing = [arm.chosen_on for arm in arms if arm.chosen_on is not None]
        for seed in dict.fromkeys([*choosing, *(seed for arm in arms for seed in arm.seeds)]):
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
        numbers: Sequence[int] = range(len(arm.trials))
        awaits_choice = False
        if arm.chosen_on not in (None, seed):
            chosen = self.read_state(arm, arm.chosen_on).best_trial
            numbers, awaits_choice = [0 if chosen is None else chosen.number], chosen is None
        trials = [self._read_trial(arm, seed, number) for number in numbers]
        return State(arm=arm, seed=seed, trials=trials, awaits_choice=awaits_choice)

    def _read_trial(self, arm: Arm, seed: int, number: int) -> Trial:
        pipeline = self.open_once(arm, seed, number)
        steps = pipeline.dry_run(_build_scores(arm))
        counted = manifest.read(pipeline.make_corpus())["counts"]["tokens"]
        return Trial(
            number=number,
            settings=arm.trials[number],
            run=pipeline.run,
            given_tokens=counted[pipeline.inputs.target.tokenizer_fingerprint]["train"],
            written={name: write.compute_written_ratio(pipeline, name) for name in write.list_steps(pipeline)},
            steps=steps,
        )


def _build_scores(arm: Arm) -> Callable[[Pipeline], object]:
    """Return a function that makes the scores of an arm, for a dry run."""

    def measure(pipeline: Pipeline) -> None:
        pipeline.evaluate_model(arm.model)
        pipeline.ask_model(arm.model)

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
    for trial in grid.read_state(arm, seed).trials:
        if arm.method is None or (trial.training_step is not None and trial.training_step.done):
            continue
        pipeline = grid.open_pipeline(arm, seed, trial.number)
        plan.check_disk(pipeline, trial.steps)
        if len(arm.trials) > 1:
            title = f"trial {trial.number + 1} of {len(arm.trials)}: {describe_settings(trial.settings)}"
            grid.console.print(make_plain_text(title), soft_wrap=True)
        pipeline.train_method(arm.method, needs_weights=False)
    state = grid.read_state(arm, seed)
    if state.awaits_choice:
        raise ValueError(f"seed {arm.chosen_on} has not chosen yet; see there")
    assert state.best_trial is not None
    answer_copies.take_answers(grid.study.output, state.best_trial.task_steps)
    _build_scores(arm)(grid.open_pipeline(arm, seed, state.best_trial.number))


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


def explain_captures(grid: Grid) -> list[str]:
    """Return a line for each source and seed that has to be captured: why no capture that is there can be used."""
    lines: dict[Path, str] = {}
    for seed, arm in grid.iterate_arms():
        state = grid.read_state(arm, seed)
        for trial in () if state.is_measured else state.trials:
            missing = [s for s in trial.steps if s.is_needed and s.stage is capture.STAGE and s.folder not in lines]
            pipeline = grid.open_once(arm, seed, trial.number)
            explained = reuse.explain_captures(pipeline, missing) if missing else []
            lines |= {step.folder: f"seed {seed}, {line}" for step, line in zip(missing, explained, strict=True)}
    return list(lines.values())
