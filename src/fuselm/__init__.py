"""Fuse the knowledge of several language models, of any architecture and tokenizer, into one of them.

A run file says which models and texts; `load_run` reads it, and its object makes the stages and returns the result:

>>> run = fuselm.load_run("mine.yaml", quiet=True)
>>> result = run.run()
>>> result.model.is_dir()
True

Examples in docstrings run where `mine.yaml` is a run file whose target is `models/target` and whose one source,
`other`, is `models/other`; its texts are in `texts.jsonl`. What a run is made of is here, too: stores of distributions
(`Store`), vocabularies (`load_vocabulary`), alignment (`Aligner`), fusion (`fuse`), the loss (`fusion_loss`), and
measurements (`score_texts`, `measure_fidelity`). Names are imported when they are first used, so that `import fuselm`
is quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuselm.alignment.aligner import Aligner
    from fuselm.fusion.fuse import fuse
    from fuselm.models.loading import load_model, load_tokenizer, load_vocabulary
    from fuselm.models.locating import Model, locate_model
    from fuselm.models.merging.methods import merge_tensors
    from fuselm.models.vocabulary import Vocabulary
    from fuselm.results.measurements import measure_fidelity, score_texts
    from fuselm.results.run_result import RunResult, load_result
    from fuselm.runs.merging.session import merge_models
    from fuselm.runs.session import FusionRun, load_run
    from fuselm.stores.distributions import Distributions
    from fuselm.stores.store import Store, Trace
    from fuselm.training.objective import FusedRows, fusion_loss

_MODULES = {
    "Aligner": "alignment.aligner",
    "Distributions": "stores.distributions",
    "FusedRows": "training.objective",
    "FusionRun": "runs.session",
    "Model": "models.locating",
    "RunResult": "results.run_result",
    "Store": "stores.store",
    "Trace": "stores.store",
    "Vocabulary": "models.vocabulary",
    "fuse": "fusion.fuse",
    "fusion_loss": "training.objective",
    "load_model": "models.loading",
    "load_result": "results.run_result",
    "load_run": "runs.session",
    "load_tokenizer": "models.loading",
    "load_vocabulary": "models.loading",
    "locate_model": "models.locating",
    "measure_fidelity": "results.measurements",
    "merge_models": "runs.merging.session",
    "merge_tensors": "models.merging.methods",
    "score_texts": "results.measurements",
}

__all__ = [
    "Aligner",
    "Distributions",
    "FusedRows",
    "FusionRun",
    "Model",
    "RunResult",
    "Store",
    "Trace",
    "Vocabulary",
    "fuse",
    "fusion_loss",
    "load_model",
    "load_result",
    "load_run",
    "load_tokenizer",
    "load_vocabulary",
    "locate_model",
    "measure_fidelity",
    "merge_models",
    "merge_tensors",
    "score_texts",
]
__version__ = version("fuselm")


def __getattr__(name: str) -> Any:
    """Import a public name from its module, at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fuselm' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"fuselm.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names, those not imported yet among them."""
    return sorted([*__all__, "__version__"])
