"""Open a run, or the console that shows the progress of a command, for several commands."""

from pathlib import Path
from typing import Annotated

import typer

from fuselm.models.choices import DTYPES
from fuselm.system.remote_paths import open_path

RunFile = Annotated[
    Path,
    typer.Argument(
        help="YAML file with the options of the run; `fuselm options` lists them.", show_default=False, parser=open_path
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options to override: train.learning_rate=1e-4", show_default=False)
]
ReadingOverrides = Annotated[
    list[str] | None, typer.Argument(help="Options to override: align.top_k=32", show_default=False)
]
DTYPES_HELP = f"Number type to run the model in: {', '.join(DTYPES)}."
TextsOption = typer.Option(help="File, folder or pattern: rows with `text` (JSON lines, CSV, Parquet), or .txt.")

ColumnOption = typer.Option(
    help="Field of the files that stands for `text` or `domain`, as text=content; may be repeated.", show_default=False
)


TemplateOption = typer.Option(
    help="Chat template of a model without one: plain, a file, or target for the other model's.", show_default=False
)


def read_columns(given: list[str] | None) -> dict[str, str]:
    """Return fields of files by what they stand for, from options such as text=content."""
    if not given:
        return {}
    from fuselm.documents import conversation_rows, texts

    columns: dict[str, str] = {}
    for text in given:
        name, _, field = text.partition("=")
        known = (*texts.FIELDS, *conversation_rows.FIELDS)
        if name not in known or not field:
            raise ValueError(f"--column {text}: write NAME=FIELD, as text=content; NAME is one of {', '.join(known)}")
        columns[name] = field
    return columns


def open_checked_run(run_file: Path, overrides: list[str] | None, last: str):
    """Open a run, and check all that can be checked before the stages up to `last` are made."""
    from fuselm.runs import plan

    pipeline = open_run(run_file, overrides)
    plan.check_disk(pipeline)
    if pipeline.check(last):
        pipeline.print_notes()
    pipeline.record_steps(last)
    return pipeline


def open_run(run_file: Path, overrides: list[str] | None):
    """Open a run: make its folder, and read its texts and models."""
    from fuselm.runs import config
    from fuselm.runs.pipeline import Pipeline
    from fuselm.system import processes, progress

    console = open_stderr(quiet=processes.rank() > 0)
    with progress.announce(f"reading {run_file}, its texts and models"):
        pipeline = Pipeline(config.load(run_file, overrides or []), console)
        pipeline.start()
    return pipeline


def open_stderr(*, quiet: bool = False):
    """Open the console on which long commands show their progress."""
    from fuselm.system import progress, terminal

    console = terminal.open_console(stderr=True, quiet=quiet)
    progress.use_console(console)
    return console
