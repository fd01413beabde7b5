"""Run a run file from Python: load it, make one stage or all of them, and get what they made as objects.

Python and the command line go through the same stages, so each finds what the other has made.
"""

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fuselm.documents.document_texts import TextsById
from fuselm.models.chat.messages import Dialogue
from fuselm.results import diagnosis, fidelity_measurement, inspection
from fuselm.results.run_result import RunResult, load_result
from fuselm.runs import config, diagnosis_inputs, fidelity_inputs, plan, run_folders
from fuselm.runs.options.files import Overrides
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import write
from fuselm.stores.store import Store
from fuselm.system import processes, progress, terminal
from fuselm.system.remote_paths import open_path

INSPECTED_WIDTH = 160  # characters of a line of `FusionRun.inspect`


class FusionRun:
    """Make the stages of one run, each after those that it needs; what is made already is not made again.

    `options` are those of the run file, checked. A stage's method returns what the stage made: stores of
    distributions, folders of trained models, or numbers. `run` makes everything and returns the result.

    >>> run = fuselm.load_run("mine.yaml", ["train.passes=1"], quiet=True)
    >>> run.options.train.passes
    1
    >>> sorted(run.capture())
    ['other']
    >>> fused = run.fuse()
    >>> len(fused) > 0
    True
    """

    def __init__(self, options: config.RunOptions, *, quiet: bool = False):
        self.options = options
        self._console = terminal.open_console(stderr=True, quiet=quiet or processes.rank() > 0)
        progress.use_console(self._console)
        self._pipeline = Pipeline(options, self._console)
        self._pipeline.start()

    def __repr__(self) -> str:
        return f"FusionRun({str(self.folder)!r}, {', '.join(self.options.sources)} into {self.options.target.model})"

    @property
    def folder(self) -> Path:
        """Return the folder that everything is written to."""
        return self._pipeline.folder

    @property
    def notes(self) -> list[str]:
        """Return what you may want to change before anything is made, such as too few held-out documents."""
        return self._pipeline.notes

    def texts(self) -> Mapping[str, str | Dialogue]:
        """Return the texts that distributions are captured of, by the names that documents have in stores.

        Each is read from disk when it is asked for.
        """
        return TextsById(write.fusion_documents(self._pipeline))

    def capture(self) -> dict[str, Store]:
        """Capture every source's next-token distributions over the training documents; return the stores by source."""
        return {name: Store(path) for name, path in self._checked("capture").capture().items()}

    def align(self) -> dict[str, Store]:
        """Bring the captured distributions into the target's tokens; return the stores by source."""
        return {name: Store(path) for name, path in self._checked("align").align().items()}

    def fuse(self) -> Store | dict[str, Store]:
        """Fuse the aligned distributions of all sources into one store; with `fuse.pairwise`, into one by source."""
        made = self._checked("fuse").fuse()
        return {name: Store(path) for name, path in made.items()} if isinstance(made, dict) else Store(made)

    def train(self) -> dict[str, Path]:
        """Train the target on the fused distributions, and on the text alone; return the folders by method.

        With `fuse.pairwise` a copy is trained for each source, and the folders have the sources' names.
        """
        return self._checked("train").train()

    def merge(self) -> Path | None:
        """Merge what was trained as `merge` says; return the merge's folder, or None if the run merges nothing."""
        return self._checked("merge").merge().get("")

    def run(self) -> RunResult:
        """Make all stages, publish the model and the page in the run's folder, and return the result."""
        self._checked("report").report()
        return load_result(self.folder)

    def diagnose(self) -> dict[str, Any]:
        """Tell before any training whether fusing can help: bits per byte of each source and of each way to fuse.

        Captures and aligns what is not there yet, and reads the target, too. Returns the numbers that `fuselm diagnose
        --json` prints.
        """
        pipeline = self._checked("align")
        with progress.show_progress(self._console, "diagnose") as shown:
            return diagnosis.diagnose(**diagnosis_inputs.gather_from_pipeline(pipeline), progress=shown)

    def inspect(self, document: int = 0, *, top: int = 3) -> str:
        """Return a training document token by token, as far as the run has come, as `fuselm inspect` prints it.

        It shows the `top` most expected tokens of each model, and which source raised the fused probability.
        """
        stages, text = run_folders.find_stages(self.folder), io.StringIO()
        console = Console(file=text, width=INSPECTED_WIDTH, markup=False, highlight=False)
        lines = inspection.show_document(
            stages,
            document,
            top=top,
            load_vocabulary=partial(run_folders.read_vocabulary, self.folder),
            target=run_folders.find_target(self.folder, stages),
            width=INSPECTED_WIDTH,
        )
        for line in lines:
            console.print(line, soft_wrap=True)
        return text.getvalue()

    def measure_fidelity(self, source: str | None = None) -> dict[str, Any]:
        """Measure how much of what the sources captured survives alignment, by source.

        Captures what is not there yet. None means all sources except the target itself. Returns the numbers that
        `fuselm fidelity --json` prints.
        """
        gathered = fidelity_inputs.gather_from_pipeline(self._checked("capture"), source)
        return {
            name: fidelity_measurement.measure_captured_fidelity(**inputs, console=self._console)
            for name, inputs in gathered.items()
        }

    def _checked(self, last: str) -> Pipeline:
        plan.check_disk(self._pipeline)
        if self._pipeline.check(last):
            self._pipeline.print_notes()
        self._pipeline.record_steps(last)
        return self._pipeline


def load_run(run_file: str | Path | Mapping[str, Any], overrides: Overrides = (), *, quiet: bool = False) -> FusionRun:
    """Read and check a run file, its texts and its models; nothing expensive is made.

    `run_file` may also be a mapping with the options that a file would hold. `overrides` are those of the command line,
    one such as `"train.learning_rate=1e-4"` or several, or a mapping from names to values. Progress is shown on stderr
    unless `quiet`.

    Raises:
        ValueError: If the run file, a text or a model cannot be used; the message is one line that says what to do.

    >>> run = fuselm.load_run("mine.yaml", quiet=True)
    >>> run.folder.name
    'mine'
    """
    given = isinstance(run_file, Mapping)
    options = config.check(run_file, overrides) if given else config.load(open_path(run_file), overrides)
    return FusionRun(options, quiet=quiet)
