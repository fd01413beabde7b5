"""Decay the weights towards where they started, instead of towards zero.

AdamW pulls every weight towards zero (Loshchilov and Hutter 2019), which takes away what a pretrained model knows.
Pulled towards its start a model forgets less of that (L2-SP, Li et al. 2018; decoupled here, as in AdamW):
before each step, w <- w + rate * decay * (start - w).

The start lies beside the optimizer's moments of each weight, so whatever shards, saves and loads those does the same
with the start.
"""

import torch
from torch import Tensor

START = "start"  # the optimizer's state holds where a weight began so
PULL = "decay_towards_start"  # a group of the optimizer holds the factor so, and its own decay is 0


def decay_towards_start(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's decay another aim. Call this before its first step, and before its state is loaded."""
    for group in optimizer.param_groups:
        group[PULL], group["weight_decay"] = group["weight_decay"], 0.0
    starts: dict[Tensor, Tensor] = {}  # of weights before their first step, which have no state yet

    def pull(optimizer: torch.optim.Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"] if group[PULL] else ():
                if weight.grad is None:
                    continue
                if START in (state := optimizer.state.get(weight, {})):
                    weight.detach().lerp_(state[START], float(group["lr"] * group[PULL]))
                else:
                    starts[weight] = weight.detach().clone()

    def remember(optimizer: torch.optim.Optimizer, *_) -> None:
        for weight, start in starts.items():
            optimizer.state[weight][START] = start
        starts.clear()

    optimizer.register_step_pre_hook(pull)
    optimizer.register_step_post_hook(remember)
