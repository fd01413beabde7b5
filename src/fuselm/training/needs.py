"""Check the packages that training needs before anything is made, because captures may take hours."""

import importlib.util
from collections.abc import Sequence

from fuselm.models.locating import Model


def check_training(
    target: Model,
    *,
    trackers: Sequence[str],
    lora_rank: int | None,
    lora_modules: Sequence[str] | None,
    quantize: str | None,
) -> None:
    """Raise `ValueError` if the target cannot be trained as these options of `train` say."""
    check_trackers(trackers)
    if lora_rank is not None:
        from fuselm.training import adapters

        adapters.check_adapters(target, rank=lora_rank, modules=lora_modules, quantize=quantize)


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` if one of the trackers is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.trackers: wandb is not installed; pip install 'fuselm[wandb]'")
