"""Keep the mean of the weights that training goes through, and score it in their place.

At a constant learning rate each step fits its own few documents; the mean of many steps keeps what they have in common
(Polyak and Juditsky 1992; Izmailov et al. 2018, stochastic weight averaging).

The mean lies beside the optimizer's moments of each weight, from the first step on, so that whoever shards, saves and
loads those does it with the mean too. While a step is scored and saved the two change places: a checkpoint has the mean
as its model, and the weights to go on from in its optimizer. Before the mean begins it is the last weights: so that is
true of every checkpoint.
"""

from collections.abc import Iterator

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn
from transformers import TrainerCallback

NAME = "other_weights"  # in the optimizer's state: the mean, or while that is shown, the weights


class Averaging(TrainerCallback):
    """Average the weights from step `first` on. Add this after the callback that says when to score."""

    def __init__(self, first: int):
        self._first = first
        self._shown = False
        self._into_mean = get_swa_multi_avg_fn()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Watch the optimizer's steps. Call this before its first step, and before its state is loaded."""
        optimizer.register_step_post_hook(_add_means)

    def on_train_begin(self, args, state, control, **kwargs):
        self._shown = state.global_step > 0  # going on from a checkpoint

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if self._shown:
            self._exchange(optimizer)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        weights, means = zip(*_walk_trained_weights(optimizer), strict=True)
        self._into_mean(means, weights, max(state.global_step - self._first, 0))
        if control.should_evaluate or control.should_save:
            self._exchange(optimizer)

    def _exchange(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, other in _walk_trained_weights(optimizer):
            shown = weight.clone()
            weight.copy_(other)
            other.copy_(shown)
        self._shown = not self._shown


def _add_means(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if (of_weight := optimizer.state.get(weight)) and NAME not in of_weight:  # its first step
                of_weight[NAME] = weight.detach().clone()


def _walk_trained_weights(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the weights that have had a step, each with its mean."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if of_weight := optimizer.state.get(weight):
                yield weight.detach(), of_weight[NAME]
