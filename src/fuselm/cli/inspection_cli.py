"""Define the commands that look into a fusion: `inspect`, `diagnose` and `fidelity`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fuselm.alignment.choices import METHODS
from fuselm.cli.openings import DTYPES_HELP, Overrides, TextsOption, open_checked_run, open_stderr
from fuselm.cli.score_printing import print_scores
from fuselm.system.streams import print_line

app = typer.Typer()


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
        console=open_stderr(),
        report=report,
    )
    print_scores(result, as_json)
    if report is not None and not as_json:
        print_line(report)
