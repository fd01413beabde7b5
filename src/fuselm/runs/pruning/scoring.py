"""Score the units of a model's structures, or read the scores that an interrupted command has left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models.pruning import activations, importance
from fuselm.models.pruning.choices import BY_GRADIENT
from fuselm.models.pruning.gradients import Gradients, Sample, compute_gradients
from fuselm.models.pruning.importance import Scores
from fuselm.models.pruning.layers import find_layer_prefix, find_layers, read_layer_number
from fuselm.runs.pruning.plan import PrunePlan
from fuselm.system import atomic_files

FILE = ".scores.safetensors"  # hidden, so that nothing takes it for weights; it goes once the model is made


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """Hold the scores of units by structure and place, and of layers if some are to go."""

    units: dict[str, Scores]
    layers: Tensor | None


def score_model(
    plan: PrunePlan, model: PreTrainedModel, samples: Sequence[Sample], *, advance: Callable[[int], object]
) -> ModelScores:
    """Score what the plan may remove. `advance` is told how many tokens were read."""
    how, has_layers = plan.options.importance, "layers" in plan.removed_structures
    if how == "activations":
        units, layers = activations.measure_activations(
            model, plan.couplings, samples, with_layers=has_layers, advance=advance
        )
        return ModelScores(units=units, layers=layers)
    if how == "random":
        generator = torch.Generator().manual_seed(plan.options.seed)
        drawn = {c.structure: importance.draw_scores(c, plan.options.seed + n) for n, c in enumerate(plan.couplings)}
        count = plan.before.get("layers", 0)
        return ModelScores(units=drawn, layers=torch.rand(count, generator=generator, dtype=torch.float64))
    gradients: Gradients | None = None
    if how in BY_GRADIENT:
        gradients = compute_gradients(model, samples, squares=how != "param_first", advance=advance)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def score_tensor(name: str) -> Tensor:
        squares = None if gradients is None or gradients.squares is None else gradients.squares[name]
        return importance.score_weights(
            how, weights[name], None if gradients is None else gradients.mean[name], squares
        )

    layers = None
    if has_layers:
        prefix, layers = find_layer_prefix(model.config), torch.zeros(len(find_layers(model)), dtype=torch.float64)
        for name in weights:
            if (layer := read_layer_number(name, prefix)) is not None:
                layers[layer] += score_tensor(name).sum(dtype=torch.float64).cpu()
    return ModelScores(
        units={c.structure: importance.score_units(c, score_tensor) for c in plan.couplings}, layers=layers
    )


def write_scores(folder: Path, scores: ModelScores) -> None:
    """Write scores into a folder, whole or not at all."""
    tensors = {
        f"{structure} {' '.join(map(str, place))}": of_place
        for structure, places in scores.units.items()
        for place, of_place in places.items()
    }
    if scores.layers is not None:
        tensors["layers"] = scores.layers
    atomic_files.write_file(folder / FILE, lambda path: save_file(tensors, path), seal=True)


def read_scores(folder: Path) -> ModelScores | None:
    """Return the scores that are in a folder; None if they are not there whole."""
    if not (folder / FILE).exists() or not atomic_files.is_whole(folder / FILE):
        return None
    tensors = load_file(folder / FILE)
    units: dict[str, Scores] = {}
    for name, tensor in tensors.items():
        structure, _, place = name.partition(" ")
        if structure != "layers":
            units.setdefault(structure, {})[tuple(map(int, place.split()))] = tensor
    return ModelScores(units=units, layers=tensors.get("layers"))
