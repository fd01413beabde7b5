"""Define the commands that tell about options: the reference, and the JSON schema for editors."""

import json
from typing import Annotated

import typer

from fuselm.system.streams import print_line

app = typer.Typer(rich_markup_mode=None)

SCHEMAS = ("run", "study")


def _complete_option(incomplete: str) -> list[str]:
    """Return the names of sections and options that begin with what was typed."""
    from fuselm.runs.options import reference

    groups = reference.list_groups()
    names = [*(group.name for group in groups), *(option.name for group in groups for option in group.options)]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


@app.command()
def options(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Option or section, as train or train.learning_rate.",
            show_default=False,
            autocompletion=_complete_option,
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/options.md.")] = False,
) -> None:
    """Print what the options of run files and study files may be, their defaults, and what they do."""
    from fuselm.runs.options import reference

    if markdown and name is not None:
        raise ValueError("--markdown: prints the whole page; drop it or the name")
    _print_lines(reference.write_markdown() if markdown else reference.write_text(reference.select_groups(name)))


@app.command()
def schema(
    kind: Annotated[
        str,
        typer.Argument(help=f"{' or '.join(SCHEMAS)}: which file it is for.", autocompletion=lambda: list(SCHEMAS)),
    ] = "run",
) -> None:
    """Print the JSON schema of a run file or a study file, by which editors complete and check it."""
    if kind not in SCHEMAS:
        raise ValueError(f"{kind}: no such file; take {' or '.join(SCHEMAS)}")
    from fuselm.runs.options import schema as schemas

    _print_lines(json.dumps(schemas.build_run_schema() if kind == "run" else schemas.build_study_schema(), indent=1))


def _print_lines(text: str) -> None:
    for line in text.rstrip("\n").split("\n"):
        print_line(line)
