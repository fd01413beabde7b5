"""Shares of a soup: their gradient against finite differences, autograd and mergekit's, and their learning."""

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fuselm.models.merging.soups import (
    EMBEDDINGS,
    OTHERS,
    OUTPUT,
    choose_on_grid,
    compute_share_gradients,
    fill_model,
    group_parameters,
    learn_shares,
    list_grid,
)

COUNT = 3
IDS = torch.tensor([[5, 2, 8, 1, 9, 3, 3, 7], [4, 4, 1, 0, 6, 2, 10, 5]])


def build(seed: int, kind: str) -> PreTrainedModel:
    """Return a GPT-2, which computes in float64 throughout, or a Llama, which computes some things in float32."""
    tied = kind != "untied"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            sizes = {
                "vocab_size": 11,
                "n_embd": 8,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 16,
                "initializer_range": 0.3,
            }
            return GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            tie_word_embeddings=tied,
            attention_bias=True,
        )
        return LlamaForCausalLM(config).double()


@pytest.fixture(params=["untied", "tied", "gpt2"])
def soup(request):
    """Return a model to fill, its groups, and a reader of three models."""
    models = [dict(build(seed, request.param).named_parameters()) for seed in range(COUNT)]
    model = build(COUNT, request.param)
    named = group_parameters(model)
    order = list(dict.fromkeys(named.values()))
    groups = {name: order.index(group) for name, group in named.items()}
    return model, groups, order, lambda name: [own[name].detach() for own in models]


def loss_of(model) -> torch.Tensor:
    logits = model(IDS).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


def draw_shares(groups: int) -> torch.Tensor:
    return torch.softmax(torch.randn(groups, COUNT, generator=torch.Generator().manual_seed(7)).double(), dim=1)


def test_every_linear_map_has_a_group(soup):
    model, groups, order, _ = soup
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    tied = model.config.tie_word_embeddings
    if isinstance(model, GPT2LMHeadModel):
        assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", EMBEDDINGS, OTHERS} <= set(order)
        return
    assert set(order) == {*linear, EMBEDDINGS, OTHERS, *(() if tied else (OUTPUT,))}
    assert groups["model.layers.0.self_attn.q_proj.weight"] == groups["model.layers.0.self_attn.q_proj.bias"]
    assert groups["model.norm.weight"] == groups["model.layers.1.input_layernorm.weight"] == order.index(OTHERS)


def test_the_gradient_is_that_of_finite_differences(soup):
    model, groups, order, read = soup
    shares = draw_shares(len(order))
    fill_model(model, groups, shares, read)
    _, gradients = compute_share_gradients(model, groups, read, lambda: loss_of(model))
    step, near = (1e-5, 1e-6) if isinstance(model, GPT2LMHeadModel) else (1e-2, 2e-2)
    for group, number in [(0, 0), (1, 2), (order.index(OTHERS), 1), (order.index(EMBEDDINGS), 0)]:
        values = []
        for sign in (1, -1):
            moved = shares.clone()
            moved[group, number] += sign * step
            fill_model(model, groups, moved, read)
            values.append(float(loss_of(model).detach()))
        assert gradients[group, number] == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=near, abs=1e-4 * near
        )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_is_that_of_autograd_through_a_softmax(soup):
    model, groups, order, read = soup
    logits = torch.randn(len(order), COUNT, dtype=torch.float64, requires_grad=True)
    mixed = {
        name: sum(share * own for share, own in zip(torch.softmax(logits, dim=1)[group], read(name), strict=True))
        for name, group in groups.items()
    }
    tied = {"lm_head.weight": mixed[next(iter(groups))]} if model.config.tie_word_embeddings else {}
    loss_of(lambda ids: functional_call(model, mixed | tied, (ids,))).backward()
    shares = torch.softmax(logits.detach(), dim=1)
    fill_model(model, groups, shares, read)
    _, gradients = compute_share_gradients(model, groups, read, lambda: loss_of(model))
    expected = shares * (gradients - (shares * gradients).sum(dim=1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-8, atol=1e-12)


def test_the_gradient_is_that_of_mergekits_autograd(soup):
    """mergekit keeps the graph to the models: dL/dW_i = a_i dL/dW, so <dL/dW_i, W_i> / a_i is the share's gradient."""
    model, groups, order, read = soup
    weights = [0.2, 0.5, 0.3]
    leaves = [{n: read(n)[i].clone().requires_grad_() for n in groups} for i in range(COUNT)]
    mixed = merge_state_dicts(
        {str(i): own for i, own in enumerate(leaves)},
        "linear",
        parameters={"weight": {str(i): w for i, w in enumerate(weights)}},
        dtype=torch.float64,
    )
    tied = {"lm_head.weight": mixed[next(iter(groups))]} if model.config.tie_word_embeddings else {}
    loss_of(lambda ids: functional_call(model, dict(mixed) | tied, (ids,))).backward()
    fill_model(model, groups, torch.tensor([weights] * len(order), dtype=torch.float64), read)
    _, gradients = compute_share_gradients(model, groups, read, lambda: loss_of(model))
    for i, weight in enumerate(weights):
        expected = torch.zeros(len(order), dtype=torch.float64)
        for name, group in groups.items():
            expected[group] += (leaves[i][name].grad * leaves[i][name].detach()).sum() / weight
        torch.testing.assert_close(gradients[:, i], expected, rtol=1e-6, atol=1e-9)


def test_learning_finds_the_model_that_the_loss_wants(soup):
    """The loss is the distance to a mixture of known shares, so those are what is found."""
    model, groups, order, read = soup
    wanted = draw_shares(len(order))
    fill_model(model, groups, wanted, read)
    goal = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def distance() -> torch.Tensor:
        return sum((p - goal[name]).square().sum() for name, p in model.named_parameters())

    start, value = choose_on_grid(model, groups, read, grid=2, score=lambda: float(distance().detach()))
    learned, reached = learn_shares(
        model,
        groups,
        read,
        start,
        losses=[distance] * 300,
        learning_rate=0.1,
        pull=0.0,
        score=lambda: float(distance().detach()),
        score_every=300,
    )
    assert reached < 1e-3 * value
    known = torch.arange(len(order)) != order.index(OTHERS)  # which all models have alike
    torch.testing.assert_close(learned[known], wanted[known], rtol=0, atol=0.02)
    pulled, _ = learn_shares(
        model,
        groups,
        read,
        start,
        losses=[distance] * 50,
        learning_rate=0.1,
        pull=1e6,
        score=lambda: 0.0,
        score_every=50,
    )
    assert (pulled - start).abs().max() < 0.1


@pytest.mark.parametrize(("models", "steps", "count"), [(2, 4, 5), (3, 2, 7), (3, 3, 10), (1, 3, 1)])
def test_the_grid_has_every_share_and_the_even_ones(models, steps, count):
    grid = list(list_grid(models, steps))
    assert len(grid) == count == len({tuple(shares) for shares in grid})
    assert all(sum(shares) == pytest.approx(1) for shares in grid)
    assert any(shares == pytest.approx([1 / models] * models) for shares in grid)
