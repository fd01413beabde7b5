"""Merge models from Python, as `fuselm merge` does from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from fuselm.models.locating import Model
from fuselm.models.merging.choices import METHODS
from fuselm.results.command_texts import cut_documents, load_vocabularies, read_rows
from fuselm.runs.merging.merge import make_merge, plan_merge
from fuselm.runs.merging.recipe import MergeOptions
from fuselm.runs.options import problems
from fuselm.system import progress, terminal


def merge_models(
    models: Sequence[str | Path | Mapping[str, Any]],
    out: str | Path,
    *,
    method: str = "linear",
    base: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    texts: str | Path | None = None,
    dtype: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Path:
    """Merge the weights of models that share an architecture into `out`, and return that folder.

    It is an ordinary folder that `from_pretrained` loads. What is there already is not made again, and an interrupted
    merge resumes.

    Args:
        models: Hub ids, folders or GGUF files. A mapping has a `model`, and parameters of the method for it alone.
        out: The folder to make.
        method: A method of docs/how-to/merge.md.
        base: The model that differences are taken from, if the method has a base.
        parameters: Parameters of the method, for all models.
        texts: What `soup` chooses its weights on: a file, a folder or a pattern.
        dtype: The type of the result's weights; the first model's if None.
        seed: Decides what DARE drops, and the batches of `soup`.
        quiet: Show no progress on stderr.

    Raises:
        ValueError: If the models cannot be merged, or a parameter is not one of the method's; one line says why.

    >>> folder = fuselm.merge_models(
    ...     [{"model": "runs/mine", "weight": 0.7}, {"model": "models/target", "weight": 0.3}], "merged", quiet=True
    ... )
    >>> fuselm.locate_model(str(folder)).output_size == fuselm.locate_model("models/target").output_size
    True
    """
    given: dict[str, Any] = {
        "method": method,
        "models": [dict(of) if isinstance(of, Mapping) else str(of) for of in models],
        "base": None if base is None else str(base),
        "parameters": dict(parameters or {}),
        "texts": None if texts is None else str(texts),
        "dtype": dtype,
        "seed": seed,
    }
    if method not in METHODS:
        raise ValueError(f"method: {method} is none of {', '.join(METHODS)}; choose one")
    try:
        options = MergeOptions.model_validate(given)
    except ValidationError as error:
        raise ValueError(problems.describe_first_problem(error, "merge", MergeOptions)) from None
    console = terminal.open_console(stderr=True, quiet=quiet)
    plan = plan_merge(options)
    chosen_on = read_documents(options.texts, plan.like.model, console) if options.texts else {}
    with progress.show_progress(console, "merge") as shown:
        make_merge(plan, Path(out), shown, **chosen_on)
    return Path(out)


def read_documents(texts: str, model: Model, console: Console) -> dict[str, Any]:
    """Return the `documents` that a soup is chosen on, cut to what the model can read, and its `vocabulary`.

    Raises `ValueError` if there are conversations and the model has no chat template.
    """
    rows = read_rows(texts, "merge", console)
    (vocabulary,) = load_vocabularies(rows, [model], option=None)
    return {"documents": cut_documents(rows, [(model, vocabulary)], "merge", console), "vocabulary": vocabulary}
