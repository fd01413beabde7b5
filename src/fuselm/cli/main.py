"""Define the commands: what each takes, and which functions it calls."""

import io
import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fuselm.alignment.choices import METHODS
from fuselm.cli import doctor_cli, endings, init_cli, merge_cli, options_cli, store_cli
from fuselm.cli.version import VersionOption
from fuselm.models.choices import DTYPES
from fuselm.models.library_output import silence_libraries
from fuselm.system.foreign_text import escape_controls
from fuselm.system.streams import print_line

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(init_cli.app)
app.add_typer(doctor_cli.app)
app.add_typer(store_cli.app, name="store")
app.add_typer(options_cli.app)
app.command()(merge_cli.merge)

RunFile = Annotated[
    Path, typer.Argument(help="YAML file with the options of the run; `fuselm options` lists them.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options to override: train.learning_rate=1e-4", show_default=False)
]
DTYPES_HELP = f"Number type to run the model in: {', '.join(DTYPES)}."
TextsOption = typer.Option(help="File, folder or pattern: rows with `text` (JSON lines, CSV, Parquet), or .txt.")


@app.callback()
def take_common_options(version: VersionOption = False) -> None:
    """Fuse the knowledge of several language models, of any architecture and tokenizer, into one."""


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    silence_libraries()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells whoever imports it which kernels it lacks
    sys.exit(endings.run_command(_run_command))


def _run_command() -> int:
    """Run the command and return its exit code. The parser's refusals are printed without escapes of their text."""
    try:
        return app(standalone_mode=False) or 0
    except typer.BadParameter.__mro__[1] as error:  # the parser's UsageError, which typer does not export
        shown = io.StringIO()
        error.show(file=shown)
        print(escape_controls(shown.getvalue(), keep="\n"), end="", file=sys.stderr)
        return error.exit_code


def _open_checked_run(run_file: Path, overrides: list[str] | None, last: str):
    """Open a run, and check all that can be checked before the stages up to `last` are made."""
    from fuselm.runs import plan

    pipeline = _open_run(run_file, overrides)
    plan.check_disk(pipeline)
    pipeline.check(last)
    return pipeline


def _open_run(run_file: Path, overrides: list[str] | None):
    """Open a run: make its folder, and read its texts and models."""
    from fuselm.runs import config
    from fuselm.runs.pipeline import Pipeline
    from fuselm.system import processes, progress

    console = _open_stderr(quiet=processes.rank() > 0)
    with progress.announce(f"reading {run_file}, its texts and models"):
        pipeline = Pipeline(config.load(run_file, overrides or []), console)
        pipeline.start()
    return pipeline


def _make_stages(last: str, run_file: Path, overrides: list[str] | None) -> None:
    pipeline = _open_checked_run(run_file, overrides, last)
    pipeline.make(last)
    if not pipeline.has_made_anything:
        pipeline.console.print(f"{last}: nothing to do, all of it is in {pipeline.folder}", soft_wrap=True)


@app.command()
def run(run_file: RunFile, overrides: Overrides = None) -> None:
    """Make all stages: from several models and a corpus to the fused model and its report."""
    pipeline = _open_checked_run(run_file, overrides, "report")
    pipeline.report()
    if not pipeline.has_made_anything:
        pipeline.console.print("Nothing to do: every stage of this run is done.")
    from fuselm.results.pages.results_table import draw_results
    from fuselm.system import manifest, processes, terminal

    if processes.rank() > 0:
        return
    summary = manifest.read_json(pipeline.folder / "summary.json", drop=pipeline.folder / "summary.json")
    terminal.open_console().print(draw_results(summary))
    for name in ("model", "report.html", "summary.json"):
        print_line(f"{name:13s} {pipeline.folder / name}")


@app.command()
def capture(run_file: RunFile, overrides: Overrides = None) -> None:
    """Capture every source's next-token distributions over the training documents."""
    _make_stages("capture", run_file, overrides)


@app.command()
def align(run_file: RunFile, overrides: Overrides = None) -> None:
    """Bring the captured distributions into the target's vocabulary."""
    _make_stages("align", run_file, overrides)


@app.command()
def fuse(run_file: RunFile, overrides: Overrides = None) -> None:
    """Fuse the distributions of all sources into one for each token."""
    _make_stages("fuse", run_file, overrides)


@app.command()
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train the target on the fused distributions, and the causal-LM baseline."""
    _make_stages("train", run_file, overrides)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run file; or, with --texts, a model.", show_default=False)],
    overrides: Overrides = None,
    texts: Annotated[str | None, TextsOption] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPES_HELP)] = "auto",
) -> None:
    """Score in bits per byte: a run's models on its held-out documents, or any model on any texts."""
    if texts is None:
        if as_json or dtype != "auto":
            raise ValueError("--json and --dtype are for a model with --texts; `fuselm report` prints a run's table")
        if not model.endswith((".yaml", ".yml")):
            raise ValueError(f"{model}: not a run file (.yaml); to evaluate a model, add --texts FILE.jsonl")
        return _make_stages("evaluate", Path(model), overrides)
    if overrides:
        raise ValueError(f"{overrides[0]}: has no effect on a model with --texts; drop it")
    from fuselm.results import measure

    return _print_scores(measure.measure_bits_per_byte(model, texts, dtype=dtype, console=_open_stderr()), as_json)


@app.command()
def report(run_file: RunFile, overrides: Overrides = None) -> None:
    """Write the table, the HTML page and the fused model's folder."""
    _make_stages("report", run_file, overrides)


@app.command()
def plan(run_file: RunFile, overrides: Overrides = None) -> None:
    """Estimate what a run will take: tokens, disk, memory and time, from a short calibration."""
    from fuselm.runs import plan
    from fuselm.system import terminal
    from fuselm.system.durations import format_duration

    began = time.monotonic()
    pipeline, console, failed = _open_run(run_file, overrides), terminal.open_console(), []
    for check in (lambda: plan.check_disk(pipeline), lambda: pipeline.check("capture")):
        try:
            check()
        except ValueError as error:
            failed.append(str(error))
    console.print(plan.draw_token_counts(pipeline))
    rows, chosen, not_calibrated = plan.calibrate(pipeline)
    if chosen:
        console.print(plan.draw_machine(chosen))
    console.print(plan.draw_estimates(rows))
    console.print(f"planned in {format_duration(time.monotonic() - began, decimals=0)}")
    if failed := [*failed, *not_calibrated]:
        raise ValueError(failed[0])  # below the tables, which say what can be said


@app.command()
def study(
    study_file: Annotated[Path, typer.Argument(help="YAML file with runs to compare.", show_default=False)],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what is done and what is left; train nothing.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the pages of what is done so far; train nothing.")
    ] = False,
) -> None:
    """Compare a grid of runs that share captures, in tables and figures."""
    if plan and report:
        raise ValueError("--plan and --report: take one, as --plan writes no pages")
    console = _open_stderr()
    from fuselm.results.pages import study_page
    from fuselm.runs.studies import comparison, trials
    from fuselm.runs.studies import study as studies
    from fuselm.system import progress, terminal

    with progress.announce(f"reading {study_file}, its texts and models"):
        checked = studies.load(study_file, overrides or [])
        grid = trials.Grid(checked, console)
        grid.check()
        trials.make_output_folder(checked)
        grid.check_texts()
    if plan:
        terminal.open_console().print(trials.draw_progress(grid))
        return

    def render() -> None:
        result = comparison.compare_arms(grid)
        comparison.write_comparison(checked, result)
        study_page.write_pages(checked.output, result)

    failed = [] if report else trials.run_study(grid, render)
    render()
    for name in ("study.json", "results.md", "study.html"):
        print_line(checked.output / name)
    if failed:
        raise ValueError(
            f"{len(failed)} of the arms failed, the first: {failed[0]}; run the same command to try them again"
        )


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="A run file, or the folder of a run.", show_default=False)],
    doc: Annotated[int, typer.Option(help="Number of a training document, from 0.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Expected tokens to show for each distribution.")] = 3,
) -> None:
    """Show one document, token by token: what sources and the fusion expect, and who raised the probability."""
    from fuselm.results import inspection
    from fuselm.runs import run_folders
    from fuselm.system import terminal

    console = terminal.open_console()
    folder = run_folders.resolve_folder(run)
    stages, load_vocabulary = run_folders.find_stages(folder), partial(run_folders.read_vocabulary, folder)
    target = run_folders.find_target(folder, stages)
    for line in inspection.show_document(stages, doc, top=top, load_vocabulary=load_vocabulary, target=target):
        console.print(line, soft_wrap=not console.is_terminal)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="A run file, or the folder of a finished run.", show_default=False)],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
) -> None:
    """Tell before any training whether fusing can help: the bits per byte of each source and each way to fuse."""
    from fuselm.results import diagnosis
    from fuselm.results.pages.diagnosis_table import draw_diagnosis
    from fuselm.results.report_path import check_report_path
    from fuselm.runs import diagnosis_inputs
    from fuselm.system import atomic_files, progress, terminal

    if report is not None:
        check_report_path(report)
    if run.is_dir() and overrides:
        raise ValueError(f"{overrides[0]}: has no effect on a finished run; drop it, or diagnose its run file")
    if run.is_dir():
        inputs = diagnosis_inputs.gather_from_folder(run, _open_stderr())
    else:
        inputs = diagnosis_inputs.gather_from_pipeline(_open_checked_run(run, overrides, "align"))
    with progress.show_progress(_open_stderr(), "diagnose") as shown:
        result = diagnosis.diagnose(**inputs, progress=shown)
    if report is not None:
        from fuselm.results.pages import diagnosis_page

        atomic_files.write_text(report, diagnosis_page.render_page(result))
    if as_json:
        print_line(json.dumps(result))
        return
    terminal.open_console().print(draw_diagnosis(result))
    if report is not None:
        print_line(report)


@app.command()
def fidelity(
    source: Annotated[str, typer.Option(help="Hub id, folder or GGUF file.")],
    target: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; only its tokenizer is used.")],
    texts: Annotated[str, TextsOption],
    method: Annotated[
        list[str],
        typer.Option(
            help=f"{', '.join(METHODS)}; several times to compare.",
            show_default="span",
            autocompletion=lambda: list(METHODS),
        ),
    ] = ("span",),  # type: ignore[assignment]
    top_k: Annotated[int, typer.Option(min=1, help="Entries kept for each token.")] = 64,
    sampled_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens that the source writes to check what its rows say of other tokens; 0: none."),
    ] = 8192,
    dtype: Annotated[str, typer.Option(help=DTYPES_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write: what is lost, where and why.")] = None,
) -> None:
    """Measure how much of a source survives alignment to a target, on any texts, before any training."""
    from fuselm.results.fidelity_measurement import measure_fidelity

    result = measure_fidelity(
        source,
        target,
        texts,
        methods=method,
        top_k=top_k,
        sampled_tokens=sampled_tokens,
        dtype=dtype,
        console=_open_stderr(),
        report=report,
    )
    _print_scores(result, as_json)
    if report is not None and not as_json:
        print_line(report)


def _open_stderr(*, quiet: bool = False):
    """Open the console on which long commands show their progress."""
    from fuselm.system import progress, terminal

    console = terminal.open_console(stderr=True, quiet=quiet)
    progress.use_console(console)
    return console


def _print_scores(result: dict, as_json: bool) -> None:
    """Print the numbers of each domain and their average, as JSON or as a table."""
    if as_json:
        print_line(json.dumps(result))
        return
    from rich.table import Table

    from fuselm.results.notes import describe_conditional, describe_unspelled_bytes
    from fuselm.system import terminal

    console = terminal.open_console()
    for method, scores in result.get("methods", {"": result}).items():
        table = Table("domain", *scores["average"], title=method or None)
        for name, values in [*scores["domains"].items(), ("average", scores["average"])]:
            table.add_row(name, *map(_format_number, values.values()))
        console.print(table)
        if "verdict" in scores:
            arrives, fidelity = scores["informed"]["own_bits"], scores["informed"]["fidelity"]
            verdict = terminal.make_plain_text(scores["verdict"], style="bold").append_text(
                terminal.make_plain_text(
                    f": {arrives:.1%} of the source's bits lie in spans with information; "
                    f"fidelity there {_format_number(fidelity)}; {scores['candidates_spelled']:.1%} of its other "
                    "candidates spell what their bytes say",
                    style="not bold",
                )
            )
            console.print(verdict)
            console.print(terminal.make_plain_text(describe_conditional(scores["conditional"])))
        for note in describe_unspelled_bytes(scores):
            console.print(terminal.make_plain_text(note, style="dim"))


def _format_number(value: float | int | None) -> str:
    if value is None:
        return "∞"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
