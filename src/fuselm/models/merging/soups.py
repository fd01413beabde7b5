"""Learn how much of each model a weighted mean takes: one weight for each linear map (SoupLM, arXiv 2407.08196).

The shares of a linear map are a softmax of logits z, one for each model. Embeddings, the output layer and all other
parameters have shares of their own, one for each of the three groups. One model holds the mean W; the gradient in a
share is that in W times the model's own weights, dL/da_i = <dL/dW, W_i>, so memory is one model and one of its
gradients, whatever the number of models.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

Reader = Callable[[str], Sequence[Float[Tensor, "*shape"]]]  # a parameter's tensor of every model, by its name
Shares = Float[Tensor, "groups models"]
EMBEDDINGS, OUTPUT, OTHERS = "embeddings", "output layer", "others"
LEAST_SHARE = 1e-3  # a logit of a smaller one would be too far away to come back from


def group_parameters(model: torch.nn.Module) -> dict[str, str]:
    """Return the group of each parameter by its name: its linear map's, or one of `EMBEDDINGS`, `OUTPUT`, `OTHERS`."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    groups: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is outputs:
            group = OUTPUT
        elif module is inputs or isinstance(module, torch.nn.Embedding):
            group = EMBEDDINGS
        else:
            group = name if isinstance(module, torch.nn.Linear | Conv1D) else OTHERS
        for own, _ in module.named_parameters(recurse=False):
            groups[f"{name}.{own}" if name else own] = group
    return {name: groups[name] for name, _ in model.named_parameters()}  # a tied output layer is an embedding


def list_grid(models: int, steps: int) -> Iterator[list[float]]:
    """Yield all shares of so many models that are multiples of 1 / `steps`; the even ones, if they are none of them."""
    for counts in itertools.product(range(steps + 1), repeat=models):
        if sum(counts) == steps:
            yield [count / steps for count in counts]
    if steps % models:
        yield [1 / models] * models


@torch.no_grad()
def fill_model(model: torch.nn.Module, groups: Mapping[str, int], shares: Shares, read: Reader) -> None:
    """Make every parameter the weighted mean of the models' by the shares of its group."""
    for name, parameter in model.named_parameters():
        own = shares[groups[name]].tolist()
        parameter.zero_()
        for share, tensor in zip(own, read(name), strict=True):
            parameter.add_(tensor.to(parameter), alpha=share)


def compute_share_gradients(
    model: torch.nn.Module, groups: Mapping[str, int], read: Reader, compute_loss: Callable[[], Float[Tensor, ""]]
) -> tuple[float, Shares]:
    """Return the loss of a filled model, and its gradient in the shares of each group, in float64."""
    count = len(read(next(iter(groups))))
    gradients = torch.zeros(max(groups.values()) + 1, count, dtype=torch.float64)

    def take(name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            own = parameter.grad.double()
            for number, tensor in enumerate(read(name)):
                gradients[groups[name], number] += (own * tensor.to(own)).sum().cpu()
            parameter.grad = None

        return collect

    hooks = [p.register_post_accumulate_grad_hook(take(name)) for name, p in model.named_parameters()]
    try:
        loss = compute_loss()
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return float(loss.detach()), gradients


def choose_on_grid(
    model: torch.nn.Module,
    groups: Mapping[str, int],
    read: Reader,
    *,
    grid: int,
    score: Callable[[], float],
    on_score: Callable[[Sequence[float], float], object] = lambda shares, value: None,
) -> tuple[Shares, float]:
    """Return the same shares for every group that have the lowest score of a grid, and the score."""
    size, count = max(groups.values()) + 1, len(read(next(iter(groups))))
    best: tuple[float, list[float]] | None = None
    for shares in list_grid(count, grid):
        fill_model(model, groups, torch.tensor([shares] * size, dtype=torch.float64), read)
        value = score()
        on_score(shares, value)
        if best is None or value < best[0]:
            best = value, shares
    assert best is not None
    return torch.tensor([best[1]] * size, dtype=torch.float64), best[0]


def learn_shares(
    model: torch.nn.Module,
    groups: Mapping[str, int],
    read: Reader,
    start: Shares,
    *,
    losses: Sequence[Callable[[], Float[Tensor, ""]]],
    learning_rate: float,
    pull: float,
    score: Callable[[], float],
    score_every: int,
    on_score: Callable[[int, float], object] = lambda step, value: None,
) -> tuple[Shares, float]:
    """Learn shares by AdamW on their logits, one step for each of `losses`; return the best ones and their score.

    A loss gets `pull` times the squared distance of the shares from `start` added to it. The score is computed every
    `score_every` steps and at the end.
    """
    logits = start.clamp_min(LEAST_SHARE).log()
    optimizer = torch.optim.AdamW([logits], lr=learning_rate, weight_decay=0.0)
    best: tuple[float, Tensor] | None = None
    for step, compute_loss in enumerate(losses, start=1):
        shares = torch.softmax(logits.detach(), dim=1)
        fill_model(model, groups, shares, read)
        _, gradients = compute_share_gradients(model, groups, read, compute_loss)
        gradients += 2 * pull * (shares - start)
        logits.grad = shares * (gradients - (shares * gradients).sum(dim=1, keepdim=True))
        optimizer.step()
        if step % score_every == 0 or step == len(losses):
            shares = torch.softmax(logits.detach(), dim=1)
            fill_model(model, groups, shares, read)
            value = score()
            on_score(step, value)
            if best is None or value < best[0]:
                best = value, shares
    if best is None:
        raise ValueError("soup: no step to learn shares in; set steps above 0")
    return best[1], best[0]
