"""The mean of the weights that training goes through, which is scored and kept in their place.

At a constant learning rate each step fits its own few documents; the mean of many steps keeps what they have in common
(Polyak and Juditsky 1992; Izmailov et al. 2018, stochastic weight averaging).

The mean lies beside the optimizer's moments of each weight, so that whoever shards, saves and loads those does it with
the mean too. While a step is scored and saved the two change places: a checkpoint has the mean as its model, and the
weights to go on from in its optimizer.
"""

from collections.abc import Iterator

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn
from transformers import TrainerCallback

NAME = "other_weights"  # in the optimizer's state: the mean, or while that is shown, the weights


class Averaging(TrainerCallback):
    """Averages from step `first` on, that one included. To be added after the callback that says when to score."""

    def __init__(self, first: int):
        self._first = first
        self._shown = False
        self._into_mean = get_swa_multi_avg_fn()

    def on_train_begin(self, args, state, control, **kwargs):
        self._shown = state.global_step >= self._first  # going on from a checkpoint

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if self._shown:
            self._exchange(optimizer)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if state.global_step < self._first:
            return
        weights, means = [], []
        for weight, of_weight in _trained(optimizer):
            if NAME not in of_weight:  # its first step
                of_weight[NAME] = weight.clone()
            weights.append(weight)
            means.append(of_weight[NAME])
        self._into_mean(means, weights, state.global_step - self._first)
        if control.should_evaluate or control.should_save:
            self._exchange(optimizer)

    def _exchange(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, of_weight in _trained(optimizer):
            shown = weight.clone()
            weight.copy_(of_weight[NAME])
            of_weight[NAME].copy_(shown)
        self._shown = not self._shown


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, dict]]:
    """The weights that have had a step, and their state."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if of_weight := optimizer.state.get(weight):
                yield weight.detach(), of_weight
