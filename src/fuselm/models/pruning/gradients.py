"""Compute gradients of the language-modelling loss on calibration texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.system.errors import name_model_errors

Sample = Int[Tensor, "_"]  # the context token and those of a text


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Hold, by tensor, the mean gradient of the texts' losses, and the mean of their squares if it was asked for."""

    mean: dict[str, Tensor]
    squares: dict[str, Tensor] | None


def compute_gradients(
    model: PreTrainedModel, samples: Sequence[Sample], *, squares: bool, advance: Callable[[int], object]
) -> Gradients:
    """Return the gradients of a model's mean loss on each sample, averaged over samples.

    A text's loss is the mean over its tokens, so each text counts the same. `advance` is told how many tokens were
    read.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    squared = {name: torch.zeros_like(p) for name, p in parameters.items()} if squares else None
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()} if squares else {}
    model.zero_grad(set_to_none=True)
    for sample in samples:
        with name_model_errors(model.name_or_path, "computing gradients"):
            loss = compute_loss(model, sample)
            (loss / len(samples)).backward()
        if squared is not None:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    mean[name] += parameter.grad
                    squared[name].addcmul_(parameter.grad, parameter.grad, value=len(samples))
            model.zero_grad(set_to_none=True)
        advance(len(sample) - 1)
    if squared is None:
        mean = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        model.zero_grad(set_to_none=True)
    return Gradients(mean=mean, squares=squared)


def compute_loss(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Return the mean loss, in nats, of a sample's tokens after the first."""
    ids = sample.to(model.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:])
