"""Score units by what they put out while a model reads calibration texts: Minitron (arXiv 2407.14679, sec. 2.2).

A unit of an MLP or of attention is scored by the mean norm of what it hands to the projection behind it; a hidden
channel by the mean absolute output of the norms; a layer by 1 - cosine between what it reads and what it returns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models.pruning.coupling import Coupling, Place, Slices
from fuselm.models.pruning.gradients import Sample
from fuselm.models.pruning.importance import Scores
from fuselm.models.pruning.layers import find_layers
from fuselm.system.errors import name_model_errors


def measure_activations(
    model: PreTrainedModel,
    couplings: Sequence[Coupling],
    samples: Sequence[Sample],
    *,
    with_layers: bool,
    advance: Callable[[int], object],
) -> tuple[dict[str, Scores], Float[Tensor, "layers"] | None]:
    """Return the scores of each coupling's units, by structure, and those of layers.

    Raises `ValueError` if no module of the model takes what the units put out, as where experts share one tensor.
    """
    scores = {
        coupling.structure: {p: torch.zeros(coupling.units, dtype=torch.float64) for p in coupling.slices}
        for coupling in couplings
    }
    layers = find_layers(model) if with_layers else []
    turned = torch.zeros(len(layers), dtype=torch.float64)
    with _hooks(model, couplings, scores, layers, turned), torch.inference_mode():
        for sample in samples:
            with name_model_errors(model.name_or_path, "reading calibration texts"):
                model(input_ids=sample.to(model.device)[None, :-1], use_cache=False)
            advance(len(sample) - 1)
    return scores, turned if with_layers else None


@contextmanager
def _hooks(
    model: PreTrainedModel,
    couplings: Sequence[Coupling],
    scores: dict[str, Scores],
    layers: Sequence[torch.nn.Module],
    turned: Tensor,
) -> Iterator[None]:
    handles = []
    for coupling in couplings:
        for place, slices in coupling.slices.items():
            into = scores[coupling.structure][place]
            if coupling.structure == "hidden":
                for module in _find_norms(model, slices):
                    handles.append(module.register_forward_hook(_add_outputs(into)))
            else:
                module, own = _find_reader(model, coupling.structure, place, slices)
                handles.append(module.register_forward_pre_hook(_add_inputs(into, own, coupling.units)))
    for n, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(_add_turn(turned, n), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _find_reader(
    model: PreTrainedModel, structure: str, place: Place, slices: Sequence[Slices]
) -> tuple[torch.nn.Module, Slices]:
    """Return the module that takes what units put out, and where units are on its weight's input side."""
    for own in slices:
        module = model.get_submodule(own.tensor.rpartition(".")[0])
        is_linear = isinstance(module, torch.nn.Linear) and own.axis == 1
        if own.expert is None and (is_linear or (type(module).__name__ == "Conv1D" and own.axis == 0)):
            return module, own
    where = ".".join(map(str, place))
    raise ValueError(
        f"{model.config.model_type}: the activations of {structure} {where} are not handed from module to module; "
        "choose another importance, such as param_first"
    )


def _find_norms(model: PreTrainedModel, slices: Sequence[Slices]) -> list[torch.nn.Module]:
    """Return the modules that have a vector over hidden channels and no matrix."""
    modules = {own.tensor.rpartition(".")[0] for own in slices}
    found = [(name, model.get_submodule(name)) for name in sorted(modules)]
    return [m for _, m in found if all(p.ndim == 1 for p in m.parameters())]


def _add_inputs(into: Tensor, slices: Slices, units: int) -> Callable[[torch.nn.Module, tuple], None]:
    def hook(_: torch.nn.Module, arguments: tuple) -> None:
        squares = arguments[0].detach().float().square().flatten(0, -2)
        into.add_(slices.sum_by_unit(squares, units).sqrt().sum(dim=0).cpu())

    return hook


def _add_outputs(into: Tensor) -> Callable[[torch.nn.Module, tuple, Tensor], None]:
    def hook(_: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        into.add_(output.detach().reshape(-1, output.shape[-1]).double().abs().sum(dim=0).cpu())

    return hook


def _add_turn(into: Tensor, layer: int) -> Callable[..., None]:
    def hook(_: torch.nn.Module, arguments: tuple, keywords: dict, output: Tensor | tuple) -> None:
        read = arguments[0] if arguments else keywords["hidden_states"]
        returned = output[0] if isinstance(output, tuple) else output
        cosines = torch.nn.functional.cosine_similarity(read.double(), returned.double(), dim=-1)
        into[layer] += (1 - cosines).sum().cpu()

    return hook
