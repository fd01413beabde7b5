"""Test decay.py against AdamW's own decay: towards a start of zeros both are the same."""

import pytest
import torch

from fuselm.training.decay import decay_towards_start

STEPS, RATE, DECAY = 7, 0.05, 3.0


def train(start: torch.Tensor, *, towards_start: bool, saved_at: int | None = None) -> torch.Tensor:
    """Return how far weights have moved by gradients that do not depend on them."""
    torch.manual_seed(0)
    weight, idle = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2))

    def build() -> torch.optim.Optimizer:
        groups = [{"params": [weight], "weight_decay": DECAY}, {"params": [idle], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE)
        if towards_start:
            decay_towards_start(optimizer)
        return optimizer

    optimizer = build()
    for n, text in enumerate(torch.randn(STEPS, 3, 5, dtype=torch.float64)):
        (weight * text).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if n == saved_at:
            saved, optimizer = optimizer.state_dict(), build()
            optimizer.load_state_dict(saved)
    assert torch.equal(idle.detach(), torch.ones(2))  # has no gradient
    return weight.detach() - start


def test_towards_a_start_of_zeros_it_is_adamws_decay():
    zeros = torch.zeros(3, 5, dtype=torch.float64)
    torch.testing.assert_close(train(zeros, towards_start=True), train(zeros, towards_start=False))


def test_it_pulls_alike_wherever_weights_start():
    somewhere = 10 * torch.randn(3, 5, dtype=torch.float64)
    moved = train(somewhere, towards_start=True)
    torch.testing.assert_close(moved, train(torch.zeros_like(somewhere), towards_start=True))
    assert moved.abs().max() < train(somewhere, towards_start=False).abs().max()


@pytest.mark.parametrize("saved_at", [0, 3])
def test_resuming_from_a_checkpoint_makes_the_same_steps(saved_at):
    start = torch.randn(3, 5, dtype=torch.float64)
    whole = train(start, towards_start=True)
    assert torch.equal(train(start, towards_start=True, saved_at=saved_at), whole)
