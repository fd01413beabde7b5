"""What training needs beside the target, tried before anything is made: captures may take hours."""

import importlib.util
from collections.abc import Sequence

from fuselm.models.model import Model
from fuselm.runs import config


def check(target: Model, options: config.Train) -> None:
    """Raises `ValueError` if the target can't be trained as the options say."""
    check_trackers(options.trackers)
    if options.lora_rank is not None:
        from fuselm.training import adapters

        adapters.check(target, rank=options.lora_rank, modules=options.lora_modules, quantize=options.quantize)


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ValueError` if one is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.trackers: wandb is not installed; pip install 'fuselm[wandb]'")
