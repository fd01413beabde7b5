"""Define `fuselm doctor`: what is here, and what to fix."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fuselm.system.streams import print_line

app = typer.Typer(rich_markup_mode=None)


@app.command()
def doctor(
    run_file: Annotated[
        Path | None,
        typer.Argument(help="A run file: its servers are asked, and its needs looked for.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, memory, disk, caches, extras and servers, and say what to fix."""
    from fuselm.runs.doctor import examine
    from fuselm.runs.doctor_tables import draw_examination
    from fuselm.system import progress, terminal

    progress.use_console(terminal.open_console(stderr=True))
    with progress.announce("looking at this machine"):
        found = examine(run_file)
    if as_json:
        print_line(json.dumps(found))
    else:
        terminal.open_console().print(draw_examination(found))
    if found["problems"]:
        raise ValueError(found["problems"][0])
