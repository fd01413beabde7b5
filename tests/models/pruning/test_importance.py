import warnings

import pruning_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuselm.models.pruning import gradients, importance
from fuselm.models.pruning.activations import measure_activations
from fuselm.models.pruning.coupling import find_coupling

SAMPLES = [(torch.arange(n) * k) % 384 for n, k in ((13, 7), (11, 5), (17, 3))]
FIRST_AND_SECOND = {"param_first": "GroupTaylorImportance", "param_second": "GroupHessianImportance"}


def ignore(_: int) -> None:
    return None


def compute_slowly(model):
    """Return the gradients of each sample's mean loss, one dictionary a sample."""
    found = []
    for sample in SAMPLES:
        model.zero_grad()
        logprobs = model(input_ids=sample[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        loss = -sum(logprobs[i, sample[i + 1]] for i in range(len(sample) - 1)) / (len(sample) - 1)
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi", "mixtral"])
def test_gradients_and_their_squares(family):
    model = pruning_models.make_model(family)
    slow = compute_slowly(model)
    fast = gradients.compute_gradients(model, SAMPLES, squares=True, advance=ignore)
    without = gradients.compute_gradients(model, SAMPLES, squares=False, advance=ignore)
    for name in slow[0]:
        mean = sum(of[name] for of in slow) / len(slow)
        squares = sum(of[name] ** 2 for of in slow) / len(slow)
        tolerance = 1e-4 * mean.abs().max() + 1e-7
        assert (fast.mean[name] - mean).abs().max() < tolerance
        assert (without.mean[name] - mean).abs().max() < tolerance
        assert (fast.squares[name] - squares).abs().max() < 1e-3 * squares.max() + 1e-12
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("how", ["param_first", "param_second", "param_mix", "magnitude"])
def test_scores_are_sums_over_all_that_a_unit_has(how):
    """Channel c has row c of gate and up, and column c of down; a group has its heads' rows and columns."""
    model = pruning_models.make_model("llama")
    found = gradients.compute_gradients(model, SAMPLES, squares=True, advance=ignore)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def element(name, *at):
        w, g, a = weights[name][at], found.mean[name][at], found.squares[name][at]
        formulas = {
            "param_first": (w * g).abs(),
            "param_second": (w * w * a).abs(),
            "param_mix": (w * g - w * w * a / 2).abs(),
            "magnitude": w * w,
        }
        return formulas[how].sum()

    def score(name):
        return importance.score_weights(how, weights[name], found.mean[name], found.squares[name])

    every = slice(None)
    mlp = importance.score_units(find_coupling(model.config, "mlp"), score)
    groups = importance.score_units(find_coupling(model.config, "groups"), score)
    for layer in range(3):
        at = f"model.layers.{layer}.mlp."
        expected = [
            element(f"{at}gate_proj.weight", c)
            + element(f"{at}up_proj.weight", c)
            + element(f"{at}down_proj.weight", every, c)
            for c in range(64)
        ]
        torch.testing.assert_close(mlp[(layer,)].float(), torch.stack(expected), rtol=1e-5, atol=1e-9)
        at = f"model.layers.{layer}.self_attn."
        expected = [
            element(f"{at}q_proj.weight", slice(16 * g, 16 * g + 16))
            + element(f"{at}k_proj.weight", slice(8 * g, 8 * g + 8))
            + element(f"{at}v_proj.weight", slice(8 * g, 8 * g + 8))
            + element(f"{at}o_proj.weight", every, slice(16 * g, 16 * g + 16))
            for g in range(4)
        ]
        torch.testing.assert_close(groups[(layer,)].float(), torch.stack(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi", "opt", "gpt_neox"])
@pytest.mark.parametrize("how", FIRST_AND_SECOND)
def test_scores_equal_those_of_torch_pruning(family, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruning = pytest.importorskip("torch_pruning")
    model = pruning_models.make_model(family)
    samples = SAMPLES[:1]  # torch-pruning 1.6.1 keeps the last sample's squares alone
    coupling = find_coupling(model.config, "mlp")
    found = gradients.compute_gradients(model, samples, squares=True, advance=ignore)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    scores = importance.score_units(
        coupling, lambda n: importance.score_weights(how, weights[n], found.mean[n], found.squares[n])
    )
    graph = pruning.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": pruning_models.IDS, "use_cache": False},
        forward_fn=lambda m, inputs: m(**inputs).logits,
    )
    for place, slices in coupling.slices.items():
        root = next(own for own in slices if own.axis == 0 and own.tensor.endswith("weight"))
        module = model.get_submodule(root.tensor.removesuffix(".weight"))
        group = graph.get_pruning_group(module, pruning.prune_linear_out_channels, list(range(coupling.units)))
        scorer = getattr(pruning.importance, FIRST_AND_SECOND[how])(group_reduction="sum", normalizer=None, bias=True)
        model.zero_grad()
        gradients.compute_loss(model, samples[0]).backward()
        if how == "param_second":
            scorer.accumulate_grad(model)
        torch.testing.assert_close(scores[place].float(), scorer(group), rtol=1e-4, atol=1e-9)


def test_activations_are_norms_of_what_units_put_out():
    model = pruning_models.make_model("llama")
    couplings = [find_coupling(model.config, name) for name in ("mlp", "groups", "hidden")]
    units, turned = measure_activations(model, couplings, SAMPLES, with_layers=True, advance=ignore)
    mlp, groups, hidden, turn = torch.zeros(64), torch.zeros(4), torch.zeros(32), torch.zeros(3)
    inner = model.model.layers[1]

    def add_channels(module, arguments):
        mlp.add_(arguments[0][0].abs().sum(0))

    def add_groups(module, arguments):
        groups.add_(arguments[0][0].unflatten(-1, (4, 16)).norm(dim=-1).sum(0))

    inner.mlp.down_proj.register_forward_pre_hook(add_channels)
    inner.self_attn.o_proj.register_forward_pre_hook(add_groups)

    def add_outputs(module, arguments, output):
        hidden.add_(output[0].abs().sum(0))

    for norm in (m for n, m in model.named_modules() if n.endswith("norm")):
        norm.register_forward_hook(add_outputs)
    with torch.inference_mode():
        for sample in SAMPLES:
            states = model(input_ids=sample[None, :-1], use_cache=False, output_hidden_states=True).hidden_states
            for n in range(2):  # the last one is after the final norm
                turn[n] += (1 - torch.cosine_similarity(states[n][0], states[n + 1][0], dim=-1)).sum()
    torch.testing.assert_close(units["mlp"][(1,)].float(), mlp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(units["groups"][(1,)].float(), groups, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(units["hidden"][()].float(), hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned[:2].float(), turn[:2], rtol=1e-4, atol=1e-5)


def test_activations_of_experts_are_refused_in_one_line():
    model = pruning_models.make_model("mixtral")
    with pytest.raises(ValueError, match="choose another importance"):
        measure_activations(model, [find_coupling(model.config, "mlp")], SAMPLES, with_layers=False, advance=ignore)


@given(st.lists(st.floats(0, 5, width=32), min_size=1, max_size=13), st.data())
def test_the_best_units_stay_in_their_order(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    chosen = importance.choose_units({(): torch.tensor(scores)}, keep)[()].tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == keep
    left = [score for n, score in enumerate(scores) if n not in chosen]
    assert not left or max(left) <= min(scores[n] for n in chosen)


def test_random_scores_are_drawn_by_seed():
    coupling = find_coupling(pruning_models.make_model("llama").config, "mlp")
    first, again, other = (importance.draw_scores(coupling, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[p], again[p]) for p in first)
    assert not any(torch.equal(first[p], other[p]) for p in first)
