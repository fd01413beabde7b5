"""Score units by what their removal should cost, and choose those that stay.

A unit's score is the sum over all its coupled slices, as in LLM-Pruner (Ma et al., NeurIPS 2023, arXiv 2305.11627) with
its default, `group_reduction=sum`. w is a weight, g its gradient of the language-modelling loss on calibration texts.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fuselm.models.pruning.coupling import Coupling, Place

Scores = dict[Place, Tensor]  # one number for each unit of a place


def score_weights(
    importance: str,
    weight: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"] | None = None,
    squares: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the score of each weight. `squares` are means of squared gradients of single texts."""
    if importance == "magnitude":
        return weight.square()
    if importance == "param_first":
        assert gradient is not None
        return (weight * gradient).abs()
    assert squares is not None
    if importance == "param_second":
        return (weight.square() * squares).abs()
    assert importance == "param_mix" and gradient is not None, importance
    return (weight * gradient - 0.5 * weight.square() * squares).abs()


def score_units(coupling: Coupling, score_tensor: Callable[[str], Float[Tensor, "*shape"]]) -> Scores:
    """Add up the scores of weights by unit, at each place. `score_tensor` returns those of a tensor, by its name."""
    scores = {place: torch.zeros(coupling.units, dtype=torch.float64) for place in coupling.slices}
    found: dict[str, list[tuple[Place, int]]] = {}
    for place, slices in coupling.slices.items():
        for n, own in enumerate(slices):
            found.setdefault(own.tensor, []).append((place, n))
    for name, uses in found.items():
        weights = score_tensor(name)
        for place, n in uses:
            own = coupling.slices[place][n]
            values, axis = (weights, own.axis) if own.expert is None else (weights[own.expert], own.axis - 1)
            others = [other for other in range(values.ndim) if other != axis]
            along = values.sum(dim=others, dtype=torch.float64) if others else values.double()
            scores[place] += own.sum_by_unit(along.cpu(), coupling.units)
    return scores


def draw_scores(coupling: Coupling, seed: int) -> Scores:
    """Return scores drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {place: torch.rand(coupling.units, generator=generator, dtype=torch.float64) for place in coupling.slices}


def choose_units(scores: Mapping[Place, Float[Tensor, "units"]], keep: int) -> dict[Place, Int[Tensor, "kept"]]:
    """Return the `keep` units with the highest scores at each place, in their order; of equals, the first."""
    return {
        place: torch.sort(of_place.argsort(descending=True, stable=True)[:keep]).values
        for place, of_place in scores.items()
    }
