"""Define `fuselm clean`: list the folders of runs and what still needs them, ask, and delete what nothing needs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fuselm.system.remote_paths import open_path
from fuselm.system.streams import print_line

UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"))


def clean(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A run's folder, or one that runs are in.", show_default=False, parser=open_path),
    ] = None,
    captures: Annotated[
        bool, typer.Option("--captures", help="Delete captures, too, that all their runs have aligned.")
    ] = False,
    begun: Annotated[
        bool, typer.Option("--begun", help="Delete, too, what a command with other options began and would resume.")
    ] = False,
    converted: Annotated[
        bool, typer.Option("--converted", help="Delete the folders that GGUF files were converted to, of all runs.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the folders; delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """List the folders of runs with what still needs each, ask, and delete those that nothing needs."""
    if dry_run and yes:
        raise ValueError("--dry-run and --yes: take one, as --dry-run deletes nothing")
    if converted == (folder is not None):
        raise ValueError("clean: name a run's folder, or one that runs are in; or give --converted without a folder")
    if converted and (captures or begun):
        raise ValueError("--converted: takes no --captures or --begun, which are for runs")
    from rich import box
    from rich.table import Column, Table

    from fuselm.runs import cleaning, converted_models, plan
    from fuselm.system import terminal

    def survey() -> list[cleaning.Folder]:
        if folder is None:
            return converted_models.survey()
        return cleaning.survey(folder, captures=captures, begun=begun)

    found, place = survey(), converted_models.find_folder() if folder is None else folder
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("size", "age"))
    table = Table("", Column("folder", overflow="fold"), *numbers, "needed by", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in found:
        whole = each.path.is_relative_to(place.resolve())
        name = str(each.path.relative_to(place.resolve())) if whole else os.path.relpath(each.path, place.resolve())
        verdict = "delete" if each.is_useless else "keep"
        table.add_row(verdict, name, plan.format_size(each.size), _describe_age(each.seconds), each.reason)
    terminal.open_console().print(table)
    listed = plan.format_size(sum(each.size for each in found)) or "0 MiB"
    if folder is None:
        print_line(f"In all {listed} in {place}.")
    else:
        whole = plan.format_size(cleaning.measure(folder)) or "0 MiB"
        print_line(f"In all {listed} in these folders; {folder} takes {whole}, with models, scores and pages.")
        if size := converted_models.measure():
            print_line(
                f"Beside that, {plan.format_size(size)} in {converted_models.find_folder()}: GGUF files as ordinary "
                "folders, for all runs; `fuselm clean --converted` deletes them."
            )
    useless = [each for each in found if each.is_useless]
    if not useless:
        print_line("Nothing to delete.")
        return
    size = plan.format_size(sum(each.size for each in useless)) or "0 MiB"
    what = f"{len(useless)} {'folder' if len(useless) == 1 else 'folders'}, {size}"
    if dry_run:
        print_line(f"Would delete {what}.")
        return
    if not yes and not _ask(f"Delete {what}?"):
        print_line("Nothing was deleted.")
        return
    still_useless = {each.path for each in survey() if each.is_useless}
    for each in useless:  # what a run began to use while the user was asked stays
        if each.path in still_useless:
            cleaning.delete(each.path)
    print_line(f"Deleted {what}.")


def _ask(question: str) -> bool:
    """Ask on the terminal. Raises `ValueError` if there is none."""
    if not sys.stdin.isatty():
        raise ValueError("clean: no terminal to ask on; add --yes to delete, or --dry-run to list only")
    return typer.confirm(question)


def _describe_age(seconds: float) -> str:
    for length, unit in UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return "new"
