"""List the stages of a run in their order, and run them.

Each stage is a module of `runs.stages`. `run.json` in the run's folder says which folders belong to its last run file.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import yaml
from rich.console import Console

from fuselm.documents.document_list import DocumentList
from fuselm.models.locating import Model
from fuselm.runs import checks, config, input_notes, remaining_time, run_precision, step_records
from fuselm.runs.inputs import Inputs
from fuselm.runs.part_workers import PartWorkers
from fuselm.runs.ray_runs import RayRun
from fuselm.runs.run_precision import RunPrecision
from fuselm.runs.stage import Made, Stage
from fuselm.runs.stages import align, capture, corpus, evaluate, fuse, merge, report, tasks, train, write
from fuselm.runs.steps import Declared, Maker, Step, Steps
from fuselm.runs.store_places import locate_stores
from fuselm.system import atomic_files, processes
from fuselm.system.progress import Progress
from fuselm.system.remote_paths import open_path
from fuselm.system.terminal import make_plain_text

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        corpus.STAGE,
        write.STAGE,
        capture.STAGE,
        align.STAGE,
        fuse.STAGE,
        train.STAGE,
        merge.STAGE,
        evaluate.STAGE,
        tasks.STAGE,
        report.STAGE,
    )
}


class Pipeline:
    """Run the stages of one run, each after those that it needs.

    `run` holds the options and `inputs` the texts, the target and the sources. Folders of stages are made in
    `folder`; `console` shows what is being made.
    """

    def __init__(self, run: config.RunOptions, console: Console, *, precision_file: Path | None = None):
        self.run = run
        self.folder = open_path(run.output)
        self.console = console
        self.inputs = Inputs(run)
        precision_file = precision_file or self.folder / run_precision.FILE
        self.precision = RunPrecision(run, precision_file)
        self._workers = PartWorkers(run, precision_file)
        self._ray = RayRun(run, precision_file)
        self._maker = Maker(
            console,
            delegate=self._delegate,
            choose_precision=lambda: self.precision.record_choices(self.local_models),
            find_helpers=lambda stage, folder: self._workers.help(stage, folder, int(self.documents.sizes.sum())),
        )
        self.places = locate_stores(run)
        self.steps = Steps(self.places, self._maker)
        self.trusted_stores: set[Path] = set()  # existing stores that are known to hold this run's texts
        self.sampled_factor = 1.0  # more in a plan: so many times as large are the texts that these are a sample of

    @cached_property
    def documents(self) -> DocumentList:
        """Return the documents of all splits, which are made if they are not there."""
        return corpus.read(self)

    @property
    def has_made_anything(self) -> bool:
        """Tell whether any folder was made that was not there."""
        return self._maker.has_made_anything

    @property
    def local_models(self) -> dict[str, Model]:
        """Return the models that this run loads, by role: `target`, `source NAME`."""
        sources = {f"source {n}": m for n, m in self.inputs.sources.items() if n not in self.inputs.servers}
        return {"target": self.inputs.target} | sources

    @cached_property
    def notes(self) -> list[str]:
        """Return what the user may want to change before anything is made, a line for each."""
        return input_notes.describe_inputs(self.inputs, self.run)

    def start(self) -> None:
        """Write down the options of the run. Raises `ValueError` if the run's folder can't be written to."""
        if processes.rank() > 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_files.write_text(
                self.folder / "config.yaml", yaml.safe_dump(self.run.model_dump(mode="json"), sort_keys=False)
            )
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot write there ({error.strerror or error}); set another `output`"
            ) from None

    def print_notes(self) -> None:
        """Print the run's `notes`."""
        for note in self.notes if processes.rank() == 0 else []:
            self.console.print(make_plain_text(f"  note: {note}"), soft_wrap=True)

    def dry_run(self, build: "Callable[[Pipeline], object] | None" = None) -> list[Step]:
        """List the steps of `build` and which of them are needed, without making them; None means the whole run.

        `build` is called with a pipeline that makes no folder. Only the corpus is made, as all else depends on it.
        """
        self.make_corpus()
        dry = copy.copy(self)
        dry.steps = Steps(self.places)
        (build or Pipeline.measure)(dry)
        return dry.steps.list_steps()

    def check(self, last: str, build: "Callable[[Pipeline], object] | None" = None) -> list[Step]:
        """Try what the stages up to `last` need of the machine and of servers before hours of work begin.

        `build` is that of `dry_run`. Returns the steps that are to be made. Raises `ValueError` on what can't do what
        is asked of it.
        """
        order = list(STAGES.values())
        needed = set(order[: order.index(STAGES[last]) + 1])
        steps = [step for step in self.dry_run(build) if step.is_needed and step.stage in needed]
        checks.check_needs(self, steps)
        return steps

    def record_steps(self, last: str) -> None:
        """Record what this run is to make, so that nothing it needs is deleted as useless before it is finished.

        The steps up to the stage `last` are counted on the screen as they are made.
        """
        if processes.rank() == 0:
            steps, order = self.dry_run(), list(STAGES.values())
            step_records.write_steps(self.folder, steps)
            self.places.register()
            chosen = [step for step in steps if order.index(step.stage) <= order.index(STAGES[last])]
            self._maker.remaining = remaining_time.foresee(self, chosen)

    def make(self, stage: str) -> Made:
        """Make a stage, given by its name in `STAGES`, and what it needs. Return its folders."""
        return STAGES[stage].make(self)

    def _delegate(self, declared: Declared, shown: Progress) -> bool:
        """Let Ray's workers make a folder, if the run has them, and tell whether they did."""
        is_shared = declared.by_parts or declared.stage is write.STAGE
        if not is_shared or declared.name in self.inputs.servers or processes.world_size() > 1:
            return False
        return self._ray.make(declared.stage, declared.folder, shown, by_parts=declared.by_parts)

    def join(self, stage: str, folder: Path) -> None:
        """Make parts of one folder of a stage, together with the process that began it, and nothing else."""
        helper = copy.copy(self)
        helper.steps = Steps(self.places, Maker(self.console, choose_precision=lambda: None, only=folder))
        STAGES[stage].make(helper)

    def make_corpus(self) -> Path:
        """Read, cut and split the texts."""
        return corpus.make(self)

    def write(self) -> dict[str, Path]:
        """Let sources write more text. Return folders by source."""
        return write.make(self)

    def capture(self) -> dict[str, Path]:
        """Keep sources' distributions over the training text. Return folders by source."""
        return capture.make(self)

    def align(self, *, draws: bool | None = None) -> dict[str, Path]:
        """Bring them to the target's vocabulary. Return folders by source. `draws`: see `stages.align.make`."""
        return align.make(self, draws=draws)

    def fuse(self) -> Made:
        """Make one distribution of all sources' for each token; of each source's, by source, if they are pairwise."""
        return fuse.make(self)

    def train(self) -> dict[str, Path]:
        """Make every training. Return folders by method, or for copies of the target by source."""
        return train.make(self)

    def merge(self) -> dict[str, Path]:
        """Merge what was trained. Return the merged model's folder under the empty name; nothing if none is merged."""
        return merge.make(self)

    def train_method(self, method: str, *, needs_weights: bool = True) -> Path:
        """Make the model of one method, `clm` or `fused`. See `stages.merge.find_trained`."""
        return merge.find_trained(self, method, needs_weights=needs_weights)

    def evaluate(self) -> dict[str, Path]:
        """Score every model on the held-out documents. Return folders by model."""
        return evaluate.make(self)

    def evaluate_model(self, name: str) -> Path:
        """Score `base`, a source or a method's best model on the held-out documents."""
        return evaluate.evaluate_model(self, name)

    def ask_tasks(self) -> dict[str, Path]:
        """Ask every model the run's tasks. Return folders by model and task; nothing if there are no tasks."""
        return tasks.make(self)

    def ask_model(self, name: str) -> dict[str, Path]:
        """Ask `base`, a source or a method's best model the run's tasks."""
        return tasks.ask_model(self, name)

    def measure(self) -> dict[str, Path]:
        """Score every model on the held-out documents, and ask it the run's tasks. Return the folders of the scores."""
        scored = evaluate.make(self)
        tasks.make(self)
        return scored

    def report(self) -> Path:
        """Write `summary.json`, `report.html` and `model` into the run's folder."""
        return report.make(self)
