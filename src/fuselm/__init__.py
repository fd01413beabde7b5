"""fuselm: fuse the knowledge of several language models, of any architecture and tokenizer, into one."""

from importlib import import_module
from typing import Any

_HOME = {
    "Aligner": "alignment.aligner",
    "Distributions": "stores.distributions",
    "FusedRows": "training.objective",
    "Model": "models.model",
    "Pipeline": "runs.pipeline",
    "Store": "stores.store",
    "Trace": "stores.store",
    "Vocabulary": "models.vocabulary",
    "fuse": "fusion.fuse",
    "fusion_loss": "training.objective",
    "load_model": "models.model",
    "load_tokenizer": "models.model",
    "locate": "models.model",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, from its module; torch is imported only with the names that need it."""
    if name not in _HOME:
        raise AttributeError(f"module 'fuselm' has no attribute '{name}'")
    return getattr(import_module(f"fuselm.{_HOME[name]}"), name)
