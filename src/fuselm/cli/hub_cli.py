"""`fuselm push`: send a run's fused model to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from fuselm.cli.store_cli import Private, Repo
from fuselm.system.remote_paths import open_path
from fuselm.system.streams import print_line


def push(
    run: Annotated[
        Path,
        typer.Argument(help="The folder of a finished run, or its run file.", show_default=False, parser=open_path),
    ],
    repo: Repo,
    private: Private = False,
) -> None:
    """Send a run's fused model and its card to a model repository of the Hugging Face Hub."""
    from fuselm.runs import hub_push
    from fuselm.system import progress, terminal

    progress.use_console(terminal.open_console(stderr=True))
    print_line(hub_push.push_model(run, repo, private=private))
