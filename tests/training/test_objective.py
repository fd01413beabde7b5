"""Test objective.py against the dense, looped objective and its automatic gradient, in float64."""

import math
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuselm.models.forward import OutputLayer
from fuselm.training import objective
from fuselm.training.objective import Divergence, FusedRows, Loss, fusion_loss

TOKENS, VOCAB, HIDDEN = 7, 11, 5
KINDS = ("empty", "full", "no tail", "tail")
PAPERS = Divergence()
DIVERGENCES = st.builds(
    Divergence,
    name=st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
    beta=st.sampled_from([0.1, 0.5, 0.75]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    tail=st.sampled_from(["bucket", "renormalise"]),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Hold fused rows of some tokens, as the reference and as the library have them, and a model's end."""

    hidden: Tensor
    layer: OutputLayer
    gold: list[int]
    rows: list[reference.Row]
    tails: list[float]

    @property
    def fused(self) -> FusedRows:
        width = max(map(len, self.rows), default=0) + 1  # at least one column of padding
        ids = torch.zeros(len(self.rows), width, dtype=torch.long)
        logprobs = torch.full((len(self.rows), width), -math.inf, dtype=torch.float64)
        for i, row in enumerate(self.rows):
            ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
            logprobs[i, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64).log()
        return FusedRows(ids=ids, logprobs=logprobs, tail=torch.tensor(self.tails, dtype=torch.float64))

    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.layer.weight, self.layer.bias) if x is not None]

    def ours(
        self,
        lambda_clm: float | list[float],
        divergence: Divergence = PAPERS,
        *,
        fused: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> Loss:
        rows = self.fused
        rows = FusedRows(ids=rows.ids, logprobs=rows.logprobs.to(dtype), tail=rows.tail.to(dtype))
        gold = torch.tensor(self.gold, dtype=torch.long)
        if isinstance(lambda_clm, list):
            lambda_clm = torch.tensor(lambda_clm, dtype=dtype)
        return fusion_loss(self.hidden, self.layer, gold, rows if fused else None, lambda_clm, divergence)

    def dense(self, lambda_clm: float | list[float], divergence: Divergence = PAPERS) -> tuple[Tensor, Tensor, Tensor]:
        """Return the total, causal-LM and fusion loss of the reference, summed over tokens."""
        logits = self.hidden
        if self.layer.weight is not None:
            logits = self.hidden @ self.layer.weight.T
        if self.layer.bias is not None:
            logits = logits + self.layer.bias
        logits = logits * self.layer.scale
        if self.layer.soft_cap is not None:
            logits = self.layer.soft_cap * torch.tanh(logits / self.layer.soft_cap)
        terms = reference.dense_objective(
            logits,
            self.gold,
            self.rows,
            self.tails,
            lambda_clm,
            name=divergence.name,
            beta=divergence.beta,
            temperature=divergence.temperature,
            tail_as=divergence.tail,
        )
        return tuple(term * len(self.gold) for term in terms)


def case(
    *,
    seed: int = 0,
    tokens: int = TOKENS,
    vocab: int = VOCAB,
    kinds: tuple[str, ...] = KINDS,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    through_logits: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    rng = np.random.default_rng(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.tensor(rng.normal(size=shape) * 2, dtype=dtype, requires_grad=True)

    rows, tails, gold = [], [], []
    for i in range(tokens):
        kind = kinds[i % len(kinds)]
        width = {"empty": 0, "full": vocab}.get(kind, int(rng.integers(0, vocab)))
        masses = rng.dirichlet(np.ones(width + 1))
        if kind != "tail" and width:
            masses = np.append(masses[:-1] / masses[:-1].sum(), 0.0)
        ids = rng.permutation(vocab)[:width].tolist()
        rows.append(dict(zip(ids, masses[:-1].tolist(), strict=True)))
        tails.append(float(masses[-1]))
        others = [token for token in range(vocab) if token not in ids]
        kept_gold = (rng.random() < 0.5 and width > 0) or not others
        gold.append(int(rng.choice(ids if kept_gold else others)))
    layer = OutputLayer(
        weight=None if through_logits else tensor(vocab, HIDDEN),
        bias=tensor(vocab) if bias else None,
        scale=scale,
        soft_cap=soft_cap,
    )
    return Case(
        hidden=tensor(tokens, vocab if through_logits else HIDDEN), layer=layer, gold=gold, rows=rows, tails=tails
    )


def small_chunks(rows: int, vocab: int):
    """Multiply so many rows at a time, in blocks of 2, and add 3 rows of the output layer's gradient at a time."""
    sizes = {"PRODUCT_BYTES": 8 * rows * vocab, "BLOCK_BYTES": 16 * vocab, "TILE": 3}
    return mock.patch.multiple(objective, **sizes)


def assert_equals_dense(
    c: Case, lambda_clm: float | list[float], divergence: Divergence = PAPERS, *, atol: float = 1e-10
) -> None:
    ours, dense = c.ours(lambda_clm, divergence), c.dense(lambda_clm, divergence)
    for mine, theirs in zip((ours.total, ours.clm, ours.fusion), dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=atol)
    mine, theirs = torch.autograd.grad(ours.total, c.inputs()), torch.autograd.grad(dense[0], c.inputs())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from([0, 1, 2, 5, 7]),
    vocab=st.sampled_from([1, 2, 11]),
    lambda_clm=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    divergence=DIVERGENCES,
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    soft_cap=st.sampled_from([None, 3.0]),
    rows_per_chunk=st.sampled_from([1, 3, 64]),
)
def test_loss_and_gradient_are_those_of_the_dense_objective(
    seed, tokens, vocab, lambda_clm, divergence, bias, scale, soft_cap, rows_per_chunk
):
    c = case(seed=seed, tokens=tokens, vocab=vocab, bias=bias, scale=scale, soft_cap=soft_cap)
    with small_chunks(rows_per_chunk, vocab):
        assert_equals_dense(c, lambda_clm, divergence)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), divergence=DIVERGENCES, lambdas=st.lists(st.floats(0, 1), min_size=7, max_size=7)
)
def test_every_token_may_have_a_lambda_of_its_own(seed, divergence, lambdas):
    assert_equals_dense(case(seed=seed), lambdas, divergence)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_confidences_are_those_of_the_rows(seed):
    c = case(seed=seed)
    gold = torch.tensor(c.gold, dtype=torch.long)
    expected = {
        "expected": [sum(q * q for q in row.values()) for row in c.rows],
        "gold": [row.get(token, 0.0) for row, token in zip(c.rows, c.gold, strict=True)],
    }
    for name, values in expected.items():
        assert objective.CONFIDENCES[name](c.fused, gold).tolist() == pytest.approx(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, VOCAB])
def test_every_kind_of_row_is_that_of_the_dense_objective(kind, vocab):
    assert_equals_dense(case(kinds=(kind,), vocab=vocab), 0.3)


def test_a_model_that_gives_logits_needs_no_output_layer():
    assert_equals_dense(case(through_logits=True), 0.3)


def test_a_row_without_information_adds_nothing_to_the_fusion_loss():
    loss = case(kinds=("empty",)).ours(0.0)
    assert abs(float(loss.total.detach())) < 1e-12 and abs(float(loss.fusion)) < 1e-12


def test_the_fusion_loss_of_the_models_own_distribution_is_zero_and_flat():
    c = case()
    logits = (c.hidden @ c.layer.weight.T).detach()
    rows = [dict(list(enumerate(p.tolist()))[:k]) for k, p in enumerate(torch.softmax(logits, dim=-1), start=1)]
    own = Case(hidden=c.hidden, layer=c.layer, gold=c.gold, rows=rows, tails=[1 - sum(r.values()) for r in rows])
    loss = own.ours(0.0)
    assert abs(float(loss.total.detach())) < 1e-12
    assert all(float(g.abs().max()) < 1e-12 for g in torch.autograd.grad(loss.total, own.inputs()))


def test_a_one_hot_row_on_the_gold_token_is_the_causal_lm_loss():
    c = case()
    one_hot = Case(
        hidden=c.hidden, layer=c.layer, gold=c.gold, rows=[{g: 1.0} for g in c.gold], tails=[0.0] * len(c.gold)
    )
    loss = one_hot.ours(0.5)
    torch.testing.assert_close(loss.fusion, loss.clm, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("through_logits", [False, True])
def test_gradient_is_that_of_finite_differences(through_logits, name):
    divergence = Divergence(name=name, beta=0.25, temperature=2.0)
    c = case(
        tokens=4,
        vocab=7,
        bias=not through_logits,
        soft_cap=None if through_logits else 3.0,
        through_logits=through_logits,
    )
    fused, gold = c.fused, torch.tensor(c.gold)

    def total(hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        layer = OutputLayer(weight=weight, bias=bias, scale=c.layer.scale, soft_cap=c.layer.soft_cap)
        return fusion_loss(hidden, layer, gold, fused, 0.3, divergence).total

    assert torch.autograd.gradcheck(total, c.inputs())


def test_gradient_follows_whatever_the_loss_is_multiplied_by():
    c = case(bias=True)
    once = torch.autograd.grad(c.ours(0.3).total, c.inputs())
    thrice = torch.autograd.grad(3 * c.ours(0.3).total, c.inputs())
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    """Try the output layer beside adapters, whose gradient would be as large as the layer."""
    c = case(bias=True)
    hidden, layer = c.hidden, c.layer
    if frozen == "weight":
        layer = replace(layer, weight=layer.weight.detach(), bias=layer.bias.detach())
    else:
        hidden = hidden.detach()
    with mock.patch.object(torch, "zeros_like", side_effect=torch.zeros_like) as made:
        loss = replace(c, hidden=hidden, layer=layer).ours(0.3).total
    like_the_layer = [call for call in made.call_args_list if call.args[0].shape == layer.weight.shape]
    assert len(like_the_layer) == (frozen != "weight")
    wanted = [x for x in (c.hidden, c.layer.weight, c.layer.bias) if any(x is y for y in (hidden, layer.weight))]
    for mine, whole in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(c.ours(0.3).total, wanted), strict=True
    ):
        torch.testing.assert_close(mine, whole)


def test_only_the_total_has_a_gradient():
    loss = case().ours(0.3)
    assert loss.total.requires_grad and not loss.clm.requires_grad and not loss.fusion.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrower_types_are_close(dtype, tolerance):
    exact = case(seed=1, bias=True)
    narrow = case(seed=1, bias=True, dtype=dtype)
    ours, theirs = narrow.ours(0.3, dtype=torch.float32), exact.ours(0.3)
    assert ours.total.dtype == torch.float32
    torch.testing.assert_close(ours.total.double(), theirs.total, rtol=tolerance, atol=tolerance)
    mine = torch.autograd.grad(ours.total, narrow.inputs())
    for a, b in zip(mine, torch.autograd.grad(theirs.total, exact.inputs()), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=3 * tolerance)


def test_autocast_multiplies_in_its_own_type_and_sums_in_float32():
    exact = case(seed=1)
    single = case(seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = single.ours(0.3, dtype=torch.float32)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), exact.ours(0.3).total, rtol=3e-2, atol=3e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss.total, single.inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows_per_chunk", [2, 64])
def test_lambda_1_is_bit_for_bit_the_causal_lm_loss(dtype, rows_per_chunk):
    c = case(tokens=13, bias=True, dtype=dtype)
    with small_chunks(rows_per_chunk, VOCAB):
        fused, plain = c.ours(1.0), c.ours(1.0, fused=False)
    assert torch.equal(fused.total, plain.total) and torch.equal(fused.clm, plain.clm)
    for a, b in zip(
        torch.autograd.grad(fused.total, c.inputs()), torch.autograd.grad(plain.total, c.inputs()), strict=True
    ):
        assert torch.equal(a, b)


def test_lambda_0_is_the_fusion_loss_alone():
    loss = case().ours(0.0)
    assert torch.equal(loss.total, loss.fusion)


def test_far_apart_logits_give_no_nan():
    hidden = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    layer = OutputLayer(weight=None, bias=None, scale=1.0, soft_cap=None)
    fused = FusedRows(ids=torch.tensor([[0]]), logprobs=torch.tensor([[math.log(0.5)]]), tail=torch.tensor([0.5]))
    loss = fusion_loss(hidden, layer, torch.tensor([2]), fused, 0.5)
    (gradient,) = torch.autograd.grad(loss.total, [hidden])
    assert bool(loss.total.isfinite()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("temperature", "gap"), [(1.0, 103.6), (0.5, 51.8), (0.2, 20.72)])
def test_probabilities_too_small_for_float32_in_both_rows_give_no_nan(name, temperature, gap):
    hidden = torch.tensor([[0.0, -gap, -gap - 20]], requires_grad=True)
    layer = OutputLayer(weight=None, bias=None, scale=1.0, soft_cap=None)
    fused = FusedRows(ids=torch.tensor([[0, 1]]), logprobs=torch.tensor([[-1e-6, -gap]]), tail=torch.tensor([0.0]))
    divergence = Divergence(name=name, beta=0.5, temperature=temperature)
    loss = fusion_loss(hidden, layer, torch.tensor([0]), fused, 0.3, divergence)
    (gradient,) = torch.autograd.grad(loss.total, [hidden])
    assert bool(loss.total.isfinite()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_of_the_models_own_distribution_is_zero_and_flat(name, temperature):
    c = case()
    probabilities = torch.softmax((c.hidden @ c.layer.weight.T).detach() / 3, dim=-1)  # none near 0
    layer = replace(c.layer, scale=1 / 3)
    rows = [dict(list(enumerate(p.tolist()))[:k]) for k, p in enumerate(probabilities, start=1)]
    own = Case(hidden=c.hidden, layer=layer, gold=c.gold, rows=rows, tails=[1 - sum(r.values()) for r in rows])
    loss = own.ours(0.0, Divergence(name=name, beta=0.5, temperature=temperature))
    assert abs(float(loss.total.detach())) < 1e-12
    assert all(float(g.abs().max()) < 1e-12 for g in torch.autograd.grad(loss.total, own.inputs()))


def test_reverse_kl_of_a_one_hot_row_is_finite_and_pulls_towards_it():
    c = case()
    one_hot = replace(c, rows=[{g: 1.0} for g in c.gold], tails=[0.0] * len(c.gold))
    loss = one_hot.ours(0.0, Divergence(name="reverse_kl"))
    (step,) = torch.autograd.grad(loss.total, [c.hidden])
    nearer = replace(one_hot, hidden=c.hidden - 1e-3 * step).ours(0.0, Divergence(name="reverse_kl"))
    assert math.isfinite(float(loss.total.detach())) and float(nearer.total.detach()) < float(loss.total.detach())


def test_the_temperature_of_kept_entries_alone_is_that_of_all_logits():
    c = case(kinds=("full",))
    loss = c.ours(0.0, Divergence(temperature=2.0))
    q = torch.tensor([[row[v] for v in range(VOCAB)] for row in c.rows], dtype=torch.float64)
    teacher, logits = torch.log_softmax(q.log() / 2, dim=-1), c.hidden @ c.layer.weight.T
    usual = 4 * torch.nn.functional.kl_div(
        torch.log_softmax(logits / 2, dim=-1), teacher, log_target=True, reduction="sum"
    )
    torch.testing.assert_close(loss.total, usual)


def test_a_tied_output_layer_gets_both_gradients():
    c = case()
    weight = c.layer.weight
    inputs = torch.tensor(c.gold)

    def gradient(total) -> Tensor:
        return torch.autograd.grad(total(weight[inputs]), [weight])[0]

    ours = gradient(lambda hidden: replace(c, hidden=hidden).ours(0.3).total)
    theirs = gradient(lambda hidden: replace(c, hidden=hidden).dense(0.3)[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_rows_of_the_output_layer_beyond_the_tokenizer_only_take_part_in_the_bucket():
    c = case(kinds=("tail", "no tail"), vocab=VOCAB)
    more = torch.cat([c.layer.weight.detach(), torch.ones(2, HIDDEN, dtype=torch.float64)]).requires_grad_()
    assert_equals_dense(replace(c, layer=replace(c.layer, weight=more)), 0.3)


def test_the_count_divides_the_loss_its_terms_and_its_gradient():
    c = case(bias=True)
    gold = torch.tensor(c.gold)
    whole = fusion_loss(c.hidden, c.layer, gold, c.fused, 0.3)
    for count in (5.0, torch.tensor(5)):
        mean = fusion_loss(c.hidden, c.layer, gold, c.fused, 0.3, count=count)
        for term in ("total", "clm", "fusion"):
            torch.testing.assert_close(5 * getattr(mean, term), getattr(whole, term))
        for a, b in zip(
            torch.autograd.grad(mean.total, c.inputs()),
            torch.autograd.grad(whole.total, c.inputs(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(5 * a, b)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_narrower_types_are_close_in_every_divergence(name):
    divergence = Divergence(name=name, beta=0.5, temperature=2.0)
    exact, narrow = case(seed=1), case(seed=1, dtype=torch.float32)
    ours, theirs = narrow.ours(0.3, divergence, dtype=torch.float32), exact.ours(0.3, divergence)
    torch.testing.assert_close(ours.total.double(), theirs.total, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.total, narrow.inputs()), torch.autograd.grad(theirs.total, exact.inputs()), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_bucket_too_small_for_float32_still_pulls():
    """Try exp(-200), which is 0 in float32: the ids of a bucket that should have half the mass share its pull."""
    hidden = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    layer = OutputLayer(weight=None, bias=None, scale=1.0, soft_cap=None)
    fused = FusedRows(ids=torch.tensor([[1]]), logprobs=torch.tensor([[math.log(0.5)]]), tail=torch.tensor([0.5]))
    loss = fusion_loss(hidden, layer, torch.tensor([1]), fused, 0.0)
    (gradient,) = torch.autograd.grad(loss.total, [hidden])
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.5, -0.25]]))


@pytest.mark.parametrize("lambda_clm", [1.0, 0.3])
@pytest.mark.parametrize("through_logits", [False, True])
def test_label_smoothing_is_that_of_the_dense_loss(lambda_clm, through_logits):
    c, smooth = case(seed=5, bias=not through_logits, through_logits=through_logits), 0.2
    logits = c.hidden
    if c.layer.weight is not None:
        logits = c.hidden @ c.layer.weight.T + c.layer.bias
    gold = torch.tensor(c.gold)
    fused = None if lambda_clm == 1 else c.fused
    ours = fusion_loss(c.hidden, c.layer, gold, fused, lambda_clm, label_smoothing=smooth)
    smoothed = torch.nn.functional.cross_entropy(logits, gold, label_smoothing=smooth, reduction="sum")
    expected = lambda_clm * smoothed + (1 - lambda_clm) * c.dense(0.0)[2]
    torch.testing.assert_close(ours.total, expected, rtol=1e-10, atol=1e-10)
    mine, theirs = torch.autograd.grad(ours.total, c.inputs()), torch.autograd.grad(expected, c.inputs())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
