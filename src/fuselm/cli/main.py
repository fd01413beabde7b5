"""Define the commands: what each takes, and which functions it calls."""

import contextlib
import io
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fuselm.cli import (
    clean_cli,
    doctor_cli,
    endings,
    evaluate_cli,
    hub_cli,
    init_cli,
    inspection_cli,
    merge_cli,
    options_cli,
    prune_cli,
    store_cli,
)
from fuselm.cli.command_groups import CLEAN_EXAMPLES, EVALUATE_EXAMPLES, RUN_EXAMPLES, GroupedCommands
from fuselm.cli.openings import (
    Overrides,
    RunFile,
    open_checked_run,
    open_run,
    open_stderr,
)
from fuselm.cli.sharding import ShardOption, join_shards
from fuselm.cli.version import VersionOption
from fuselm.system.foreign_text import escape_controls
from fuselm.system.library_output import silence_libraries
from fuselm.system.own_command import write_command
from fuselm.system.streams import print_line

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline

app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(init_cli.app)
app.add_typer(doctor_cli.app)
app.add_typer(store_cli.app, name="store")
app.add_typer(options_cli.app)
app.add_typer(inspection_cli.app)
app.command()(merge_cli.merge)
app.command()(prune_cli.prune)
app.command(epilog=CLEAN_EXAMPLES)(clean_cli.clean)
app.command()(hub_cli.push)
app.command(epilog=EVALUATE_EXAMPLES)(evaluate_cli.evaluate)


@app.callback()
def take_common_options(version: VersionOption = False) -> None:
    """Fuse the knowledge of several language models, of any architecture and tokenizer, into one."""


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    silence_libraries()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells whoever imports it which kernels it lacks
    sys.exit(endings.run_command(_run_command, resumes=endings.is_resumed(sys.argv[1:])))


def _run_command() -> int:
    """Run the command and return its exit code. The parser's refusals are printed without escapes of their text."""
    try:
        return app(standalone_mode=False) or 0
    except typer.BadParameter.__mro__[1] as error:  # the parser's UsageError, which typer does not export
        shown = io.StringIO()
        error.show(file=shown)
        print(escape_controls(shown.getvalue(), keep="\n"), end="", file=sys.stderr)
        return error.exit_code


def _make_stages(last: str, run_file: Path, overrides: list[str] | None) -> None:
    pipeline = open_checked_run(run_file, overrides, last)
    pipeline.make(last)
    if not pipeline.has_made_anything:
        pipeline.console.print(f"{last}: nothing to do, all of it is in {pipeline.folder}", soft_wrap=True)


@app.command(epilog=RUN_EXAMPLES)
def run(run_file: RunFile, overrides: Overrides = None) -> None:
    """Make all stages: from several models and a corpus to the fused model and its report."""
    pipeline = open_checked_run(run_file, overrides, "report")
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
    print_line(f"{'next':13s} open {pipeline.folder / 'report.html'} in a browser, and try")
    for arguments in (("inspect", pipeline.folder, "--tokens", "0:20"), ("diagnose", pipeline.folder)):
        print_line(f"{'':13s} {write_command(*arguments)}")


@app.command()
def capture(run_file: RunFile, overrides: Overrides = None, shard: ShardOption = None) -> None:
    """Capture every source's next-token distributions over the training documents."""
    join_shards(shard)
    _make_stages("capture", run_file, overrides)


@app.command()
def align(run_file: RunFile, overrides: Overrides = None, shard: ShardOption = None) -> None:
    """Bring the captured distributions into the target's vocabulary. Capture what is missing."""
    join_shards(shard)
    _make_stages("align", run_file, overrides)


@app.command()
def fuse(run_file: RunFile, overrides: Overrides = None, shard: ShardOption = None) -> None:
    """Fuse the distributions of all sources into one for each token. Make what that needs."""
    join_shards(shard)
    _make_stages("fuse", run_file, overrides)


@app.command()
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train the target on the fused distributions, and the causal-LM baseline, after what that needs."""
    _make_stages("train", run_file, overrides)


@app.command()
def report(run_file: RunFile, overrides: Overrides = None) -> None:
    """Make what a run lacks, training included, and its page and the fused model's folder."""
    _make_stages("report", run_file, overrides)


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", min=1, help="Read about so many MB of the texts, and estimate the rest.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate what a run will take: tokens, disk, memory and time, from a short calibration."""
    from fuselm.system import progress

    if sample is None:
        _print_plan(open_run(run_file, overrides), as_json)
        return
    from fuselm.runs import config, plan_advice
    from fuselm.system.remote_paths import open_path

    run, console = config.load(run_file, overrides or []), open_stderr()
    with contextlib.ExitStack() as stack:
        with progress.announce(f"reading a sample of the texts of {run_file}, and its models"):
            pipeline = stack.enter_context(plan_advice.open_sample(run, sample, console))
        _print_plan(pipeline, as_json, output=open_path(run.output))


def _print_plan(pipeline: "Pipeline", as_json: bool, *, output: Path | None = None) -> None:
    """Print what a run will take. `output` is where it will be made, if it is opened over a sample."""
    from fuselm.runs import plan, plan_advice, reuse
    from fuselm.system import terminal
    from fuselm.system.durations import format_duration

    began = time.monotonic()
    console, failed = terminal.open_console(), []
    for check in (lambda: plan.check_disk(pipeline, output=output), lambda: pipeline.check("capture")):
        try:
            check()
        except ValueError as error:
            failed.append(str(error))
    pipeline.print_notes()
    if not as_json:
        console.print(plan.draw_token_counts(pipeline))
    rows, chosen, not_calibrated = plan.calibrate(pipeline)
    failed += not_calibrated
    captures = [] if output else reuse.explain_captures(pipeline, pipeline.dry_run())
    advice = plan_advice.advise(pipeline.run, rows)
    if as_json:
        described = plan.describe_estimates(pipeline, rows, chosen) | {"advice": advice}
        print_line(json.dumps(described | {"captures": captures, "problems": failed}))
    else:
        if chosen:
            console.print(plan.draw_machine(chosen))
        console.print(plan.draw_estimates(rows))
        for line in (*captures, *advice):
            console.print(line, soft_wrap=True)
        console.print(f"planned in {format_duration(time.monotonic() - began, decimals=0)}")
    if failed:
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
    console = open_stderr()
    from fuselm.results.pages import study_page
    from fuselm.runs.studies import comparison, study, study_plan, trials
    from fuselm.system import progress, terminal

    with progress.announce(f"reading {study_file}, its texts and models"):
        checked = study.load(study_file, overrides or [])
        grid = trials.Grid(checked, console)
        grid.check()
        trials.make_output_folder(checked)
        grid.check_texts()
    if plan:
        shown = terminal.open_console()
        shown.print(study_plan.draw_progress(grid))
        for line in trials.explain_captures(grid):
            shown.print(line, soft_wrap=True)
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


if __name__ == "__main__":
    main()
