"""Define the commands that look into a fusion: `inspect`, `diagnose` and `fidelity`."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fuselm.alignment.choices import METHODS
from fuselm.cli.command_groups import DIAGNOSE_EXAMPLES, FIDELITY_EXAMPLES, INSPECT_EXAMPLES
from fuselm.cli.openings import (
    DTYPES_HELP,
    ColumnOption,
    ReadingOverrides,
    TemplateOption,
    TextsOption,
    open_checked_run,
    open_stderr,
    read_columns,
)
from fuselm.cli.score_printing import print_fidelity_scale, print_scores
from fuselm.system.remote_paths import open_path
from fuselm.system.streams import print_line

app = typer.Typer()


@app.command(epilog=INSPECT_EXAMPLES)
def inspect(
    run: Annotated[
        Path, typer.Argument(help="A run file, or the folder of a run.", show_default=False, parser=open_path)
    ],
    doc: Annotated[int, typer.Option(help="Number of a training document, from 0.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Expected tokens to show for each distribution.")] = 3,
    tokens: Annotated[
        str, typer.Option(help="Which tokens of the document, as FIRST:LAST, counted from 0.", show_default="all")
    ] = ":",
) -> None:
    """Show one document, token by token: what sources and the fusion expect, and who raised the probability."""
    from fuselm.results import inspection
    from fuselm.runs import run_folders
    from fuselm.system import terminal

    console = terminal.open_console()
    folder = run_folders.resolve_folder(run)
    stages, load_vocabulary = run_folders.find_stages(folder), partial(run_folders.read_vocabulary, folder)
    target = run_folders.find_target(folder, stages)
    for line in inspection.show_document(
        stages,
        doc,
        top=top,
        load_vocabulary=load_vocabulary,
        target=target,
        tokens=_read_range(tokens),
        width=console.width,
    ):
        console.print(line, soft_wrap=not console.is_terminal)


def _read_range(tokens: str) -> slice:
    """Return the tokens that `FIRST:LAST` names, LAST among them. Raises `ValueError` if it is nothing like that."""
    found = re.fullmatch(r"(\d*):(\d*)", tokens)
    if found is None:
        raise ValueError(f"--tokens {tokens}: no range of tokens; write FIRST:LAST, as 0:20")
    first, last = (int(number) if number else None for number in found.groups())
    if last is not None and last < (first or 0):
        raise ValueError(f"--tokens {tokens}: ends before it begins; write FIRST:LAST, as 0:20")
    return slice(first, None if last is None else last + 1)


@app.command(epilog=DIAGNOSE_EXAMPLES)
def diagnose(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run file, the folder of a finished run, or a merge file.", show_default=False, parser=open_path
        ),
    ],
    overrides: ReadingOverrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
) -> None:
    """Tell before any training whether fusing can help, or before a merge how far models are apart."""
    if run.is_file():
        from fuselm.runs.merging import recipe

        if recipe.is_merge_file(run):
            return _diagnose_merge(run, overrides, as_json=as_json, report=report)
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
        inputs = diagnosis_inputs.gather_from_folder(run, open_stderr())
    else:
        inputs = diagnosis_inputs.gather_from_pipeline(open_checked_run(run, overrides, "align"))
    with progress.show_progress(open_stderr(), "diagnose") as shown:
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


def _diagnose_merge(file: Path, overrides: list[str] | None, *, as_json: bool, report: Path | None) -> None:
    """Print how far the models of a merge are apart, layer by layer."""
    from fuselm.results.pages import merge_page
    from fuselm.results.report_path import check_report_path
    from fuselm.runs.merging.diagnosis import diagnose_merge
    from fuselm.runs.merging.merge import plan_merge
    from fuselm.runs.merging.recipe import load_recipe
    from fuselm.system import atomic_files, progress, terminal

    if report is not None:
        check_report_path(report)
    console = open_stderr()
    with progress.announce("reading the models"):
        plan = plan_merge(load_recipe(file, overrides or [])[0])
    with progress.show_progress(console, "diagnose") as shown:
        result = diagnose_merge(plan, shown)
    if report is not None:
        atomic_files.write_text(report, merge_page.render_page(result))
    if as_json:
        print_line(json.dumps(result))
        return
    terminal.open_console().print(merge_page.draw_distances(result))
    if report is not None:
        print_line(report)


@app.command(epilog=FIDELITY_EXAMPLES)
def fidelity(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A run file, or the folder of a run, whose sources are measured.",
            show_default=False,
            parser=open_path,
        ),
    ] = None,
    overrides: ReadingOverrides = None,
    source: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or GGUF file; with a run, one of its sources.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or GGUF file; only its tokenizer is used.", show_default=False),
    ] = None,
    texts: Annotated[str | None, TextsOption] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METHODS)}; several times to compare.",
            show_default="span, or the run's",
            autocompletion=lambda: list(METHODS),
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Entries kept for each token.", show_default="64, or the run's")
    ] = None,
    sampled_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that the source writes to check what its rows say of other tokens; 0: none.",
            show_default="8192, or none with a run",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=DTYPES_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write: what is lost, where and why.")] = None,
    column: Annotated[list[str] | None, ColumnOption] = None,
    template: Annotated[str | None, TemplateOption] = None,
) -> None:
    """Measure how much of a source survives alignment to a target, on any texts or those of a run, before training."""
    if run is not None:
        refused = {"--target": target, "--texts": texts, "--sampled-tokens": sampled_tokens}
        refused |= {"--column": column, "--template": template}
        if given := next((name for name, value in refused.items() if value is not None), None):
            raise ValueError(f"{given}: has no effect on a run, whose own captures are measured; drop it")
        return _measure_run_fidelity(run, overrides, source, _select_given(method, top_k), as_json, report)
    if source is None or target is None or texts is None:
        raise ValueError("fidelity: name a run, or give --source, --target and --texts")
    from fuselm.results.fidelity_measurement import measure_fidelity

    result = measure_fidelity(
        source,
        target,
        texts,
        **({"methods": ["span"], "top_k": 64} | _select_given(method, top_k)),
        sampled_tokens=8192 if sampled_tokens is None else sampled_tokens,
        dtype=dtype,
        console=open_stderr(),
        columns=read_columns(column),
        template=template,
        report=report,
    )
    print_scores(result, as_json)
    if as_json:
        return
    print_fidelity_scale()
    if report is not None:
        print_line(report)


def _select_given(methods: list[str] | None, top_k: int | None) -> dict[str, Any]:
    return ({"methods": methods} if methods else {}) | ({"top_k": top_k} if top_k else {})


def _measure_run_fidelity(
    run: Path,
    overrides: list[str] | None,
    source: str | None,
    given: dict[str, Any],
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure the sources of a run, and print each one's numbers."""
    from fuselm.results.fidelity_measurement import measure_captured_fidelity
    from fuselm.runs import fidelity_inputs

    if run.is_dir() and overrides:
        raise ValueError(f"{overrides[0]}: has no effect on a run's folder; drop it, or name the run file")
    if run.is_file():
        gathered = fidelity_inputs.gather_from_pipeline(open_checked_run(run, overrides, "capture"), source)
    else:
        gathered = fidelity_inputs.gather_from_folder(run, source)
    if report is not None and len(gathered) > 1:
        raise ValueError(f"--report: a page shows one source; add --source, one of {', '.join(gathered)}")
    console = open_stderr()
    results = {
        name: measure_captured_fidelity(**(inputs | given), console=console, report=report)
        for name, inputs in gathered.items()
    }
    if as_json:
        print_line(json.dumps(results))
        return
    for name, result in results.items():
        print_line(f"{name}, as the run captured it:")
        print_scores(result, as_json)
    print_fidelity_scale()
    if report is not None:
        print_line(report)
