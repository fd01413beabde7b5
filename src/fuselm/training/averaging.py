"""Keep the mean of the weights that training goes through, and score it in their place.

At a constant learning rate each step fits its own few documents. The mean of many steps keeps what they have in common
(Polyak and Juditsky 1992; Izmailov et al. 2018, stochastic weight averaging).

From the first step on, the mean lies beside the optimizer's moments of each weight, so whatever shards, saves and loads
those does the same with the mean. While a step is scored and saved, weights and mean are swapped: a checkpoint has the
mean as its model, and its optimizer holds the weights from which training resumes. This holds for every checkpoint,
because before averaging begins the mean equals the last weights.
"""

from collections.abc import Iterator

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn
from transformers import TrainerCallback

NAME = "other_weights"  # the optimizer's state holds the mean so, or the weights while the two are swapped


class Averaging(TrainerCallback):
    """Average the weights from step `first` on. Add this after the callback that says when to score."""

    def __init__(self, first: int):
        self._first = first
        self._swapped = False
        self._into_mean = get_swa_multi_avg_fn()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Watch the optimizer's steps. Call this before its first step, and before its state is loaded."""
        optimizer.register_step_post_hook(_add_means)

    def on_train_begin(self, args, state, control, **kwargs):
        self._swapped = state.global_step > 0  # a checkpoint has the mean as its model

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if self._swapped:
            self._swap(optimizer)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        weights, means = zip(*_walk_trained_weights(optimizer), strict=True)
        self._into_mean(means, weights, max(state.global_step - self._first, 0))
        if control.should_evaluate or control.should_save:
            self._swap(optimizer)

    def _swap(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, other in _walk_trained_weights(optimizer):
            held = weight.clone()
            weight.copy_(other)
            other.copy_(held)
        self._swapped = not self._swapped


def _add_means(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if (state := optimizer.state.get(weight)) and NAME not in state:  # after its first step
                state[NAME] = weight.detach().clone()


def _walk_trained_weights(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each weight that has made a step, with its mean."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if state := optimizer.state.get(weight):
                yield weight.detach(), state[NAME]
