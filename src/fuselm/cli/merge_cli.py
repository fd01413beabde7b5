"""`fuselm merge`: one model from several of one architecture."""

from pathlib import Path
from typing import Annotated

import typer

from fuselm.system.streams import print_line


def merge(
    file: Annotated[
        Path, typer.Argument(help="YAML file: mergekit's, our shorter form, or a run file.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to make; the file's `output` if left out.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say whether the models fit, and what the result will be; write nothing.")
    ] = False,
) -> None:
    """Merge the weights of models that share an architecture into one model; of a run file, make its merge."""
    from fuselm.models.merging.choices import METHODS
    from fuselm.runs.merging.merge import make_merge, plan_merge
    from fuselm.runs.merging.mergekit import merge_with_mergekit, require_method
    from fuselm.runs.merging.recipe import is_run_file, load_recipe
    from fuselm.runs.merging.session import read_documents
    from fuselm.system import progress, terminal

    if is_run_file(file):
        return _merge_in_run(file, out, check=check)
    if out is not None and "=" in out.name:
        raise ValueError(f"{out}: a merge file's options are not overridden here; write them there, or name a folder")
    options, output = load_recipe(file)
    folder = out or (None if output is None else Path(output))
    if folder is None and not check:
        raise ValueError(f"{file}: names no `output`; write one there, or `fuselm merge {file} FOLDER`")
    if options.method not in METHODS:
        require_method(options.method)
    console = terminal.open_console(stderr=True)
    progress.use_console(console)
    with progress.announce("reading the models"):
        plan = plan_merge(options)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    names = ", ".join(model.name for model in options.inputs)
    print_line(
        f"{options.method} of {names}: {plan.parameters:,} parameters in {len(plan.tensors)} tensors, "
        f"{plan.size / (1 << 30):.2f} GiB"
    )
    if plan.vocabulary.added:
        print_line(f"added tokens: {', '.join(token.content for token in plan.vocabulary.added)}")
    if check:
        return
    if options.method not in METHODS:
        if folder.exists():
            raise ValueError(f"{folder}: is there already; name another folder, or move it away")
        return merge_with_mergekit(options, folder)
    chosen_on = read_documents(options.texts, plan.like.model, console) if options.texts else {}
    with progress.show_progress(console, "merge") as shown:
        is_new = make_merge(plan, folder, shown, **chosen_on)
    print_line(f"{'merged into' if is_new else 'nothing to do, it is in'} {folder}")


def _merge_in_run(file: Path, out: Path | None, *, check: bool) -> None:
    """Make the merge of a run, and the stages that it needs."""
    from fuselm.cli.openings import open_checked_run

    if out is not None or check:
        raise ValueError(f"{file}: a run file, whose merge is in the run's folder; leave {out or '--check'} out")
    pipeline = open_checked_run(file, None, "merge")
    if pipeline.run.merging is None:
        raise ValueError(f"{file}: merges nothing; set `fuse.pairwise: true`, or `merge` with other models")
    if not (made := pipeline.merge()) or not pipeline.has_made_anything:
        print_line(f"nothing to do, it is in {made['']}")
