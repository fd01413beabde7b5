"""Hand methods that only mergekit has to it, where it is installed."""

import shutil
from pathlib import Path
from typing import Any

from fuselm.models.merging.choices import METHODS
from fuselm.runs.merging.recipe import MergedModel, MergeOptions
from fuselm.system.temporaries import name_temporary


def require_method(method: str) -> None:
    """Raise `ValueError` unless mergekit is installed and knows the method."""
    try:
        from mergekit.merge_methods import registered_methods
    except ImportError:
        raise ValueError(
            f"method: {method} is none of {', '.join(METHODS)}; choose one, or `pip install 'fuselm[merge]'` "
            "for mergekit's methods"
        ) from None
    known = sorted(described.spec.name for described in registered_methods())
    if method not in known:
        theirs = [name for name in known if name not in METHODS]
        raise ValueError(
            f"method: {method} is none of {', '.join(METHODS)}, nor of mergekit's {', '.join(theirs)}; choose one"
        )


def merge_with_mergekit(options: MergeOptions, out: Path) -> None:
    """Let mergekit write the merged model to `out`, whole or not at all; it must know the method."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions as TheirOptions

    configuration = MergeConfiguration.model_validate(translate_options(options))
    temporary = name_temporary(out)
    try:
        run_merge(configuration, str(temporary), options=TheirOptions(copy_tokenizer=True, lazy_unpickle=True))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def translate_options(options: MergeOptions) -> dict[str, Any]:
    """Return the options as mergekit's file has them."""
    theirs: dict[str, Any] = {
        "merge_method": options.method,
        "models": [{"model": _refer(m), "parameters": m.model_dump()["parameters"]} for m in options.models],
        "parameters": options.model_dump()["parameters"],
    }
    if options.base is not None:
        theirs["base_model"] = _refer(options.base)
    if options.dtype is not None:
        theirs["dtype"] = options.dtype
    return theirs


def _refer(model: MergedModel) -> str:
    """Return mergekit's way to write a model."""
    return model.model if model.adapter is None else f"{model.model}+{model.adapter}"
