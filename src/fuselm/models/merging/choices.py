"""Name the merging methods, with what each needs and the parameters that it takes.

`methods.FUNCTIONS` has the function of each. Files that ask for a merge are checked by these, without torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()  # the default of a parameter that must be given


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Describe a merging method: what it needs, and its parameters with their defaults.

    `per_model` parameters have a value for each model that is not the base. `choices` are the values that a parameter
    may have where its type does not tell.
    """

    says: str
    base: Literal["needed", "optional", "unused"]
    least: int = 1  # models besides the base
    most: float | int = math.inf
    per_model: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence] = field(default_factory=dict)
    needs_texts: bool = False  # shares are chosen on texts
    changes_one: bool = False  # does something with one model besides the base
    draws: bool = False  # takes `generators`, one for each model
    tells_embeddings: bool = False  # takes `by_row`, which is true for embeddings
    tells_base: bool = False  # takes `has_base`


_SPARSE = dict(weight=REQUIRED, density=1.0)
_DARE = dict(
    base="needed",
    per_model=_SPARSE,
    shared=dict(rescale=True, normalize=False, scale=1.0),
    choices=dict(rescale=(True, False, "l1", "density")),
    changes_one=True,
    draws=True,
)
METHODS: dict[str, Method] = {
    "linear": Method(
        says="Take the weighted mean.", base="unused", per_model=dict(weight=REQUIRED), shared=dict(normalize=True)
    ),
    "slerp": Method(
        says="Go from the base to one model along the great circle.",
        base="needed",
        most=1,
        shared=dict(t=REQUIRED),
        changes_one=True,
    ),
    "nuslerp": Method(
        says="Go from one model to another by their weights along the great circle; by differences, with a base.",
        base="optional",
        least=2,
        most=2,
        per_model=dict(weight=REQUIRED),
        shared=dict(nuslerp_flatten=True, nuslerp_row_wise=False),
        tells_base=True,
    ),
    "karcher": Method(says="Take the mean direction on the sphere.", base="unused", shared=dict(max_iter=10, tol=1e-5)),
    "task_arithmetic": Method(
        says="Add the weighted differences to the base.",
        base="needed",
        per_model=dict(weight=REQUIRED),
        shared=dict(normalize=False, scale=1.0),
        changes_one=True,
    ),
    "ties": Method(
        says="Keep the largest differences, elect a sign for each element, and add those that agree.",
        base="needed",
        per_model=_SPARSE,
        shared=dict(normalize=True, scale=1.0),
        changes_one=True,
    ),
    "dare_linear": Method(says="Drop differences at random, and add the others.", **_DARE),
    "dare_ties": Method(says="Drop differences at random, and add those of the others that agree in sign.", **_DARE),
    "model_stock": Method(
        says="Go towards the mean as far as the differences agree.",
        base="needed",
        least=2,
        shared=dict(filter_wise=False),
    ),
    "sce": Method(
        says="Select elements by variance, weight models by the size of differences, and erase minorities in sign.",
        base="needed",
        shared=dict(select_topk=1.0, select="deltas"),
        choices=dict(select=("deltas", "weights_only")),
    ),
    "varm": Method(says="Weight each model by the size of its differences.", base="needed"),
    "widen": Method(
        says="Weight columns by how far their length and direction moved.",
        base="needed",
        shared=dict(above_average_value_ratio=1.0, score_calibration_value=1.0),
        tells_embeddings=True,
    ),
    "soup": Method(
        says="Take the weighted mean with the weights that are best on texts, learned for each linear map.",
        base="unused",
        least=2,
        shared=dict(learn=True, grid=4, steps=100, learning_rate=0.01, pull=0.1),
        needs_texts=True,
    ),
}
