"""`fuselm prune`: a smaller model of one, with structure removed."""

from pathlib import Path
from typing import Annotated

import typer

from fuselm.models.pruning.choices import IMPORTANCES, STRUCTURES
from fuselm.system.streams import print_line


def prune(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    ratio: Annotated[float | None, typer.Option(help="Remove this share of all parameters.")] = None,
    params: Annotated[int | None, typer.Option(help="Leave about so many parameters.")] = None,
    layers: Annotated[int | None, typer.Option(help="Leave so many layers.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Leave so many channels in each MLP.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Leave so many key-value heads in each layer, with their query heads.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Leave so many hidden channels.")] = None,
    structures: Annotated[
        str | None,
        typer.Option(help=f"With --ratio or --params, cut these: {','.join(STRUCTURES)}. By default, mlp."),
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(help="With --ratio or --params, make widths a multiple of this. By default, 64.")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help=f"Score what may go by: {', '.join(IMPORTANCES)}. By default, activations, or param_first where "
            "experts share one tensor."
        ),
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="File, folder or pattern of texts to score by: the kind that matters to you.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run file whose training documents are the texts to score by.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Read so many texts. By default, 32.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Read so many tokens of each text. By default, 128.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each layer's loss costs, into pruning.html.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Draw texts and random scores with this seed.")] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what comes out, its memory and speed; write nothing.")
    ] = False,
) -> None:
    """Remove structure from a model, and write what remains as an ordinary model. Train it after that."""
    from fuselm.models.loading import load_vocabulary
    from fuselm.models.locating import locate_model
    from fuselm.runs.pruning import calibration_texts
    from fuselm.runs.pruning import plan as planning
    from fuselm.runs.pruning.options import SAMPLES, TOKENS, read_prune_options
    from fuselm.runs.pruning.prune import prune_model
    from fuselm.system import progress, terminal

    options = read_prune_options(
        ratio=ratio,
        params=params,
        layers=layers,
        intermediate_size=intermediate_size,
        kv_heads=kv_heads,
        hidden_size=hidden_size,
        structures=None if structures is None else [name.strip() for name in structures.split(",")],
        multiple=multiple,
        importance=importance,
        samples=samples,
        tokens=tokens,
        sensitivity=sensitivity,
        seed=seed,
    )
    needs_texts = options.reads_texts
    if plan and sensitivity:
        raise ValueError("--plan and --sensitivity: a plan reads no text; drop one")
    if texts is not None and run is not None:
        raise ValueError("--texts and --run: both name texts to score by; drop one")
    if not needs_texts and (texts is not None or run is not None):
        raise ValueError(f"--{'texts' if run is None else 'run'}: {options.importance} reads no text; drop it")
    if needs_texts and texts is None and run is None and not plan:
        scored = options.importance or "by default, what goes"
        raise ValueError(f"{scored} is scored by texts; add --texts FILE or --run RUN.yaml")
    console = terminal.open_console(stderr=True)
    progress.use_console(console)
    with progress.announce("reading the model's shapes"):
        located = locate_model(model)
        planned = planning.plan_pruning(located, options)
    rows = planning.describe_sizes(planned)
    if plan:
        with progress.announce("measuring speed"):
            rows += planning.describe_costs(*planning.measure_costs(planned))
    for name, before, after in rows:
        print_line(f"{name:32s} {before:>14s} -> {after}")
    if plan:
        return
    chosen = []
    if needs_texts and planned.removed_structures:
        found = (
            calibration_texts.read_texts(texts, console)
            if run is None
            else calibration_texts.read_training_texts(run, located, console)
        )
        chosen = calibration_texts.draw_samples(
            found,
            load_vocabulary(located),
            located.context_token,
            count=options.samples or SAMPLES,
            length=options.tokens or TOKENS,
            seed=options.seed,
        )
    with progress.show_progress(console, "prune") as shown:
        is_new = prune_model(planned, chosen, out, shown)
    print_line(f"{'pruned into' if is_new else 'nothing to do, it is in'} {out}")
