"""Define `fuselm init`: ask for models and texts, and write a run file for them."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fuselm.cli.openings import ColumnOption, read_columns
from fuselm.system.streams import print_line

app = typer.Typer(rich_markup_mode=None)


@app.command()
def init(
    run_file: Annotated[Path, typer.Argument(help="The run file to write.")] = Path("run.yaml"),
    target: Annotated[str | None, typer.Option(help="Model to train: hub id, folder or GGUF file.")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Model to learn from, as MODEL or NAME=MODEL; may be repeated.")
    ] = None,
    texts: Annotated[list[str] | None, typer.Option(help="File, folder or pattern of texts; may be repeated.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for what the run makes; runs/NAME by default.")] = None,
    target_as_source: Annotated[
        bool | None,
        typer.Option(
            help="Learn from the target too, so that fusion can keep what it does better already; it is captured, too.",
            show_default="yes",
        ),
    ] = None,
    column: Annotated[list[str] | None, ColumnOption] = None,
) -> None:
    """Write a run file with comments, from a few questions or from flags. Nothing is overwritten."""
    if run_file.exists():
        raise ValueError(f"{run_file}: exists already; nothing is overwritten, so name another file")
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if not asks and (
        missing := [name for name, v in (("target", target), ("source", source), ("texts", texts)) if not v]
    ):
        raise ValueError(f"--{missing[0]}: missing; give it, or run `fuselm init` on a terminal, where it is asked for")
    columns = read_columns(column)
    from fuselm.runs import new_run_file

    check_model, check_texts = new_run_file.check_model, new_run_file.check_texts
    checks = ([target], check_model), (source, new_run_file.check_source), (texts, check_texts)
    for given, check in checks:  # what flags say, before anything is asked
        for value in given or ():
            if value:
                check(value)
    target = target or _ask("Model to train (hub id, folder or GGUF file)", check=check_model)
    source = source or _ask_several("Model to learn from", "Another one (empty: no more)", new_run_file.check_source)
    if target_as_source is None:
        target_as_source = not asks or _ask_whether(
            "Learn from the target too, so that fusion keeps what it does better? It costs a reading of the texts"
        )
    texts = texts or _ask_several("Texts (file, folder or pattern)", "More texts (empty: no more)", check_texts)
    default = f"runs/{run_file.stem}"
    output = output or (_ask("Folder for what the run makes", default) if asks else default)
    choices = new_run_file.Choices(
        target=target,
        sources=new_run_file.name_sources(source, own=target if target_as_source else None),
        texts=texts,
        output=output,
        columns=columns,
    )
    written, notes = new_run_file.write_run_file(run_file, choices)
    for file in written:
        print_line(f"wrote {file}")
    for note in notes:
        print_line(f"note: {note}")
    named = shlex.quote(str(run_file))
    print_line(f"next: fuselm plan {named}, then fuselm run {named}")


def _ask(question: str, default: str | None = None, check: Callable[[str], None] = lambda answer: None) -> str:
    """Return an answer that `check` accepts; ask again, with what it says, until there is one."""
    while True:
        try:
            answer = typer.prompt(question, default=default).strip()
        except typer.Abort:
            raise ValueError("init: no answer, so nothing was written") from None
        try:
            if answer:
                check(answer)
        except ValueError as problem:
            print_line(problem)
            continue
        return answer


def _ask_whether(question: str) -> bool:
    try:
        return typer.confirm(question, default=True)
    except typer.Abort:
        raise ValueError("init: no answer, so nothing was written") from None


def _ask_several(question: str, again: str, check: Callable[[str], None]) -> list[str]:
    answers = [_ask(question, check=check)]
    while answer := _ask(again, "", check):
        answers.append(answer)
    return answers
