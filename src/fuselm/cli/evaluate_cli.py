"""Define `fuselm evaluate`: bits per byte, and tasks of lm-eval."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fuselm.cli.openings import (
    DTYPES_HELP,
    ColumnOption,
    Overrides,
    TemplateOption,
    TextsOption,
    open_checked_run,
    open_stderr,
    read_columns,
)
from fuselm.cli.score_printing import print_scores
from fuselm.cli.sharding import ShardOption, join_shards
from fuselm.system.remote_paths import open_path
from fuselm.system.streams import print_line

TASKS_HELP = "Ask tasks of lm-eval, with commas between: names of tasks, groups or tags; offline; paper."


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run file, a run's folder, or with --texts or --tasks a model.", show_default=False)
    ],
    overrides: Overrides = None,
    texts: Annotated[str | None, TextsOption] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS_HELP, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of a task, at most.", show_default=False)] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before a question.", show_default=False)] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a forward pass.", show_default=False)] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder with further tasks for lm-eval.", show_default=False)
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask in the model's chat template.")] = False,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run code that models write, in a sandbox.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPES_HELP)] = "auto",
    column: Annotated[list[str] | None, ColumnOption] = None,
    template: Annotated[str | None, TemplateOption] = None,
    shard: ShardOption = None,
) -> None:
    """Score in bits per byte, or on tasks: a run's models, or any model on any texts."""
    if shard is not None and (texts is not None or tasks is not None):
        raise ValueError("--shard: has no effect with --texts or --tasks; drop it")
    join_shards(shard)
    asked = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_tokens": batch_tokens,
        "include_path": include_path,
        "chat_template": chat_template or None,
        "run_code": run_code or None,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if tasks is None and asked:
        raise ValueError(
            f"--{next(iter(asked)).replace('_', '-')}: does nothing without --tasks; name some, or drop it"
        )
    if template is not None and texts is None:
        raise ValueError("--template: is for a model with --texts; a run file gives chat.template, so drop it")
    if tasks is not None and texts is not None:
        raise ValueError("--texts and --tasks: take one, as each is another measurement")
    if tasks is not None:
        asked["tasks"] = [name for name in tasks.split(",") if name]
        return _ask_tasks(model, asked, overrides, as_json=as_json, dtype=dtype)
    if texts is None:
        if as_json or dtype != "auto" or column:
            raise ValueError(
                "--json, --dtype, --column: for a model with --texts; a run's numbers are in its summary.json"
            )
        return _evaluate_run(open_path(model), overrides)
    if overrides:
        raise ValueError(f"{overrides[0]}: has no effect on a model with --texts; drop it")
    from fuselm.results import bits_per_byte

    scores = bits_per_byte.measure_bits_per_byte(
        model, texts, dtype=dtype, console=open_stderr(), columns=read_columns(column), template=template
    )
    return print_scores(scores, as_json)


def _ask_tasks(model: str, asked: dict[str, Any], overrides: list[str] | None, *, as_json: bool, dtype: str) -> None:
    """Ask a run's models, or one model, and print the numbers."""
    from fuselm.runs import task_runs

    path = open_path(model)
    if path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file():
        if dtype != "auto":
            raise ValueError("--dtype: has no effect on a run, whose models have their own; drop it")
        rows = task_runs.ask_run(path, asked, overrides or [], open_stderr())
    else:
        if overrides:
            raise ValueError(f"{overrides[0]}: has no effect on a model; drop it")
        rows = task_runs.ask_model(model, asked, dtype=dtype, console=open_stderr())
    if as_json:
        print_line(json.dumps(rows))
        return
    from fuselm.results.pages.tasks_table import draw_tasks
    from fuselm.system import terminal

    terminal.open_console().print(draw_tasks(rows))


def _evaluate_run(run: Path, overrides: list[str] | None) -> None:
    """Print the scores of a finished run, by its folder, or make and print those of a run file."""
    from fuselm.results.pages.results_table import draw_results
    from fuselm.system import processes, terminal

    if (run / "summary.json").is_file():
        if overrides:
            raise ValueError(f"{overrides[0]}: has no effect on a finished run; drop it, or name the run file")
        from fuselm.results.run_result import load_result

        terminal.open_console().print(draw_results(load_result(run).summary))
        return
    if run.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{run}: no run file (.yaml) or finished run; to evaluate a model, add --texts FILE.jsonl")
    from fuselm.results.run_summary import summarize_measurements

    pipeline = open_checked_run(run, overrides, "tasks")
    folders, asked = pipeline.evaluate(), pipeline.ask_tasks()
    if not pipeline.has_made_anything:
        pipeline.console.print(f"evaluate: nothing to do, all of it is in {pipeline.folder}", soft_wrap=True)
    if processes.rank() == 0:
        terminal.open_console().print(draw_results(summarize_measurements(folders, asked)))
