"""Make whole settings of a training, for tests that change a few."""

from typing import Any

from fuselm.runs.options.training import TrainOptions
from fuselm.training.trainer import TrainingSettings


def make_settings(**changes: Any) -> TrainingSettings:
    """Return the defaults of a run file in float32, with a cosine schedule and without a mean of weights."""
    options = TrainOptions().model_dump(exclude={"clm"}) | {
        "lr_schedule": "cosine",
        "average": False,
        "precision": "float32",
    }
    return TrainingSettings(**options | {"batch_documents": None, "seed": 0} | changes)
