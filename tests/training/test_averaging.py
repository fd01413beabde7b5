"""Test averaging.py against the mean of weights that were written down."""

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from fuselm.training.averaging import Averaging

STEPS = 13


def train(first: int, shown_at: set[int], saved_at: int | None = None) -> tuple[list, dict, list]:
    """Return the weights after each step, and those shown after some; steps after `saved_at` resume from there."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"trained": torch.nn.Linear(3, 5), "idle": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    averaging, state, control = Averaging(first), TrainerState(), TrainerControl()
    averaging.watch(optimizer)
    averaging.on_train_begin(None, state, control)
    went, shown, texts = [], {}, torch.randn(STEPS, 7, 3)
    for text in texts:
        averaging.on_step_begin(None, state, control, optimizer=optimizer)
        model["trained"](text).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        went.append(model["trained"].weight.detach().numpy().copy())
        control.should_evaluate = control.should_save = state.global_step in shown_at
        averaging.on_step_end(None, state, control, optimizer=optimizer)
        if control.should_save:
            shown[state.global_step] = model["trained"].weight.detach().numpy().copy()
        if state.global_step == saved_at:
            assert saved_at in shown_at
            saved = (model.state_dict(), optimizer.state_dict())
            model = torch.nn.ModuleDict({"trained": torch.nn.Linear(3, 5), "idle": torch.nn.Linear(2, 2)})
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            averaging = Averaging(first)
            averaging.watch(optimizer)
            averaging.on_train_begin(None, state, control)
    return went, shown, [w.detach() for w in model["idle"].parameters()]


@pytest.mark.parametrize("first", [1, 2, 5, STEPS])
def test_what_is_shown_is_the_mean_of_the_weights_since_the_first_step(first):
    alone, _, idle = train(STEPS + 1, set())
    went, shown, idle_too = train(first, {4, 5, 9, STEPS})
    np.testing.assert_array_equal(went, alone)  # averaging changes no step
    for step, weights in shown.items():
        expected = np.mean(went[first - 1 : step], axis=0) if step >= first else went[step - 1]
        np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(idle, idle_too, strict=True))


@pytest.mark.parametrize("saved_at", [1, 4, 9])
def test_resuming_from_a_checkpoint_makes_the_same_steps(saved_at):
    shown_at = {1, 4, 9, STEPS}
    for first in (1, 4, 7):
        whole, cut = train(first, shown_at), train(first, shown_at, saved_at)
        np.testing.assert_array_equal(whole[0], cut[0])
        for step in shown_at:
            np.testing.assert_array_equal(whole[1][step], cut[1][step])
