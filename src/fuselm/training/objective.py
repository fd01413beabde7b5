"""Compute the fusion objective on sparse rows: L = lambda * CE(gold) + (1 - lambda) * D(fused || target).

Wan et al. 2024, section 3.4; docs/paper.md, "Training". The outcomes of a row are its kept ids K, and all other ids as
one bucket. The fused row gives them q. The target gives them p; its bucket holds all that it gives to ids outside K. A
divergence compares the two, so it sees k + 1 numbers a token and no vocabulary. With d_k = dD/dlog p_k and S = sum_k
d_k, where k may be the bucket,

    dD/dz_v = d_v - p_v S for v in K,    p_v / p_bucket * (d_bucket - p_bucket S) elsewhere

so the gradient in the logits z is a softmax times one number a row, except at K and the gold id. Loss and gradient are
made in one pass over chunks of tokens: neither [tokens, vocab] logits in float32 nor a dense teacher ever exist.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fuselm.models.forward import OutputLayer, find_product_dtype, slice_rows

PRODUCT_BYTES = 1 << 28  # a chunk's logits take so many, in the type of the matrix products
BLOCK_BYTES = 1 << 22  # so many are in float32 at a time on a CPU: they stay in its cache
DEVICE_BLOCK_BYTES = 1 << 27  # so many elsewhere, for few launches a chunk (not measured)
TILE = 8192  # so many rows of the output layer's gradient are added at a time
FLOOR = 1e-6  # a fused probability of 0 would make the reverse KL infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRows:
    """Hold the fused distributions of some tokens as tensors, padded to one width.

    Row i is the distribution of token i; `tail` is the mass of the ids that it does not keep. A log-probability of -inf
    marks padding. The ids of a row are distinct, as in `Distributions`.

    >>> import torch
    >>> rows = fuselm.FusedRows(
    ...     ids=torch.tensor([[5, 2]]), logprobs=torch.tensor([[0.6, 0.3]]).log(), tail=torch.tensor([0.1])
    ... )
    >>> rows.ids.shape
    torch.Size([1, 2])
    """

    ids: Int[Tensor, "tokens k"]
    logprobs: Float[Tensor, "tokens k"]
    tail: Float[Tensor, "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Hold the loss and its two terms: sums over tokens, in nats, divided by `count`. Only `total` has a gradient."""

    total: Float[Tensor, ""]
    clm: Float[Tensor, ""]
    fusion: Float[Tensor, ""]


class Slopes(NamedTuple):
    """Hold a divergence of each row, and its slope in each log p."""

    value: Float[Tensor, "rows"]
    slope: Float[Tensor, "rows outcomes"]


def forward_kl(
    logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"], beta: float | None = None
) -> Slopes:
    """Compute KL(q || p), as the paper does: the target should give mass wherever the fused row does."""
    q = logq.exp()
    return Slopes(_sum_weighted(q, logq - logp), -q)


def reverse_kl(
    logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"], beta: float | None = None
) -> Slopes:
    """Compute KL(p || q): the target should give no mass where the fused row gives none. q is at least `FLOOR`."""
    p, ratio = logp.exp(), logp - logq.clamp_min(math.log(FLOOR))
    return Slopes(_sum_weighted(p, ratio), torch.where(p > 0, p * (ratio + 1), 0))


def jsd(logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"], beta: float | None) -> Slopes:
    """Compute beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (Agarwal et al. 2024, GKD)."""
    assert beta is not None
    q, p = logq.exp(), logp.exp()
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))  # q and p may both be too small for exp
    ratio = torch.where(p > 0, p * (logp - logm), 0)
    return Slopes(beta * _sum_weighted(q, logq - logm) + (1 - beta) * ratio.sum(1), (1 - beta) * ratio)


DIVERGENCES: dict[str, Callable[..., Slopes]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def _sum_weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.where(weights > 0, weights * values, 0).sum(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Compute D(fused || target), by name, and say how tails and temperature enter it.

    `tail` is `bucket` if the ids that were not kept are one outcome like others. It is `renormalise`, as in the paper,
    if the fused row's kept entries are scaled to sum to 1, so the target should give its bucket nothing.

    `temperature` T flattens what is compared: the kept entries and the bucket of both rows are raised to the power of
    1/T and renormalised. The divergence is multiplied by T^2, so that its gradient keeps its size (Hinton et al. 2015).
    Single ids outside K are unknown, so the bucket is flattened as one outcome in both rows. docs/paper.md says what
    that approximates.
    """

    name: str = "forward_kl"
    beta: float | None = None  # only for jsd
    temperature: float = 1.0
    tail: str = "bucket"

    def __call__(self, logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"]) -> Slopes:
        """Compare rows whose last outcome is the bucket; -inf marks padding."""
        if self.tail == "renormalise":
            kept = torch.logsumexp(logq[:, :-1], dim=1, keepdim=True)
            logq = torch.where(kept > -torch.inf, torch.cat([logq[:, :-1] - kept, logq[:, -1:] - torch.inf], 1), logq)
        if self.temperature == 1.0:
            return DIVERGENCES[self.name](logq, logp, self.beta)
        t = self.temperature
        logq, logp = torch.log_softmax(logq / t, dim=1), torch.log_softmax(logp / t, dim=1)
        value, slope = DIVERGENCES[self.name](logq, logp, self.beta)
        return Slopes(t * t * value, t * (slope - logp.exp() * slope.sum(1, keepdim=True)))


def compute_expected_probability(fused: FusedRows, gold: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """Return the gold probability that a row expects if it is right: the sum of squares of its kept entries."""
    return (2 * fused.logprobs).exp().sum(1)


def find_gold_probability(fused: FusedRows, gold: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """Return the probability that a row gives to the gold token; 0 if it does not keep it."""
    return torch.where(fused.ids == gold[:, None], fused.logprobs.exp(), 0).sum(1)


# These say how far to trust a fused row, from 0 to 1.
CONFIDENCES: dict[str, Callable[..., Tensor]] = {
    "expected": compute_expected_probability,
    "gold": find_gold_probability,
}


def fusion_loss(
    hidden: Float[Tensor, "tokens hidden"],
    layer: OutputLayer,
    gold: Int[Tensor, "tokens"],
    fused: FusedRows | None,
    lambda_clm: float | Float[Tensor, "tokens"],
    divergence: Divergence = Divergence(),
    *,
    count: int | float | Tensor = 1.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """Compute the fusion objective of some tokens, without their logits in memory, and its gradient.

    `layer`, the model's output layer, makes logits of the states `hidden`. `gold` holds the tokens that come, `fused`
    their rows, or None for the causal-LM loss alone, which equals that of lambda 1 bit for bit. `lambda_clm` weighs the
    causal-LM loss: it is one number, or one for each token. The loss is the sum over tokens divided by `count`; for a
    mean, `count` is their number. `label_smoothing` gives this share of what each gold token asks for to all ids alike.

    >>> import torch
    >>> from fuselm.models.forward import OutputLayer
    >>> weight = torch.eye(7, 3, requires_grad=True)
    >>> layer = OutputLayer(weight=weight, bias=None, scale=1.0, soft_cap=None)
    >>> rows = fuselm.FusedRows(
    ...     ids=torch.tensor([[5, 2]]), logprobs=torch.tensor([[0.6, 0.3]]).log(), tail=torch.tensor([0.1])
    ... )
    >>> loss = fuselm.fusion_loss(torch.ones(1, 3), layer, torch.tensor([5]), rows, 0.5, count=1)
    >>> loss.total.backward()
    >>> weight.grad.shape
    torch.Size([7, 3])
    """
    needs_gradient = torch.is_grad_enabled()  # it is always off inside an autograd.Function
    weights = hidden.new_ones(len(hidden), dtype=_choose_sum_dtype(hidden))
    if fused is not None:
        weights = weights * lambda_clm
    job = _LossArguments(
        layer, gold, fused, weights, divergence, 1.0 / count, bool((weights != 1).any()), label_smoothing
    )
    total, clm, fusion = _FusionLoss.apply(hidden, layer.weight, layer.bias, job, needs_gradient)
    return Loss(total=total, clm=clm, fusion=fusion)


class _LossArguments(NamedTuple):
    """Hold the arguments that have no gradient."""

    layer: OutputLayer
    gold: Int[Tensor, "tokens"]
    fused: FusedRows | None
    lambda_clm: Float[Tensor, "tokens"]
    divergence: Divergence
    share: int | float | Tensor  # one token's share of the loss
    has_fusion: bool  # does the fusion loss have any weight? If not, it is measured without a gradient
    label_smoothing: float

    def take_rows(self, rows: slice) -> "_LossArguments":
        fused = self.fused
        if fused is not None:
            fused = FusedRows(ids=fused.ids[rows], logprobs=fused.logprobs[rows], tail=fused.tail[rows])
        return self._replace(gold=self.gold[rows], fused=fused, lambda_clm=self.lambda_clm[rows])


class _FusionLoss(torch.autograd.Function):
    """Compute the loss and its gradient in forward, and hand the gradient out in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, job, needs_gradient):
        dtype = find_product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            needs = tuple(needs_gradient and need for need in ctx.needs_input_grad[:3])
            terms, gradients = _loss(hidden, weight, bias, job, dtype, needs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*terms[1:])
        return terms

    @staticmethod
    def backward(ctx, grad_total, _grad_clm, _grad_fusion):
        gradients = ctx.saved_tensors
        if grad_total != 1:  # `share` is in the gradients already, and the loss may be scaled further
            gradients = [None if g is None else g * grad_total.to(g.dtype) for g in gradients]
        return *gradients, None, None


def _loss(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"] | None,
    bias: Float[Tensor, "vocab"] | None,
    job: _LossArguments,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]]:
    """Compute the loss, its terms, and those gradients of `hidden`, `weight` and `bias` that are needed."""
    terms = hidden.new_zeros(3, dtype=_choose_sum_dtype(hidden))
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    block_bytes = BLOCK_BYTES if hidden.device.type == "cpu" else DEVICE_BLOCK_BYTES
    if weight is None:
        for rows in slice_rows(len(hidden), hidden.shape[-1], block_bytes // 4):
            logits = hidden[rows].to(terms.dtype, copy=True)
            terms += _compute_block_loss(logits, None, job.take_rows(rows))
            if grad_hidden is not None:
                grad_hidden[rows] = logits
        return terms.unbind(), [grad_hidden, None, None]

    grad_weight = torch.zeros_like(weight) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
    cast_weight = weight.to(dtype)
    vocab = len(weight)
    product = None
    for rows in slice_rows(len(hidden), vocab, PRODUCT_BYTES // dtype.itemsize):
        h = hidden[rows].to(dtype)
        product = hidden.new_empty(len(h), vocab, dtype=dtype) if product is None else product[: len(h)]
        torch.mm(h, cast_weight.T, out=product)
        part = job.take_rows(rows)
        for block in slice_rows(len(h), vocab, block_bytes // terms.dtype.itemsize):
            logits = product[block].to(terms.dtype)  # this is the product's own memory if it has that type
            terms += _compute_block_loss(logits, bias, part.take_rows(block))
            if grad_bias is not None:
                grad_bias += logits.sum(0).to(bias.dtype)
            if any(needs[:2]) and logits.dtype != dtype:
                product[block] = logits
        if grad_hidden is not None:
            grad_hidden[rows] = product @ cast_weight
        if grad_weight is not None:
            for tile in range(0, vocab, TILE):
                grad_weight[tile : tile + TILE] += product[:, tile : tile + TILE].T @ h
    return terms.unbind(), [grad_hidden, grad_weight, grad_bias]


def _choose_sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _compute_block_loss(
    logits: Float[Tensor, "rows vocab"], bias: Tensor | None, job: _LossArguments
) -> Float[Tensor, "3"]:
    """Compute the total, causal-LM and fusion loss of a few rows of logits, which become the total's gradient."""
    layer = job.layer
    if bias is not None:
        logits += bias.to(logits.dtype)
    if layer.scale != 1.0:
        logits *= layer.scale
    slope = None
    if layer.soft_cap is not None:
        logits.div_(layer.soft_cap).tanh_()
        slope = 1 - logits * logits
        logits *= layer.soft_cap
    clm, fusion = _compute_row_losses(logits, job)
    if slope is not None:
        logits *= slope
    if layer.scale != 1.0:
        logits *= layer.scale
    total = job.lambda_clm * clm + (1 - job.lambda_clm) * fusion
    return torch.stack([total.sum(), clm.sum(), fusion.sum()]) * job.share


def _compute_row_losses(
    logits: Float[Tensor, "rows vocab"], job: _LossArguments
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Compute both terms of each row. The gradient of their weighted sum takes the logits' memory."""
    fused, gold, weight = job.fused, job.gold[:, None], job.lambda_clm
    gold_logit, smooth = logits.gather(1, gold)[:, 0], job.label_smoothing
    if smooth:
        gold_logit = (1 - smooth) * gold_logit + smooth * logits.mean(1)  # as if the gold token were a little of all
    kept = None if fused is None else _FusedOutcomes.gather(fused, logits)
    if kept is not None and job.has_fusion:
        logits.scatter_(1, kept.ids, torch.where(kept.has_entries, -torch.inf, kept.logits))

    largest = logits.amax(dim=1)
    shift = torch.where(largest.isfinite(), largest, 0)
    outside = logits.sub_(shift[:, None]).exp_().sum(1)
    log_z = log_outside = outside.log() + shift
    if kept is None:
        fusion = torch.zeros_like(log_z)
    else:
        if job.has_fusion:
            log_z = torch.logaddexp(log_outside, torch.logsumexp(kept.mask_padding(), dim=1))
        else:
            log_outside = kept.sum_others(logits).log() + shift
        tail = log_outside - log_z
        fusion, slope = job.divergence(*kept.pair_outcomes(log_z, tail))
    clm = log_z - gold_logit

    if kept is None or not job.has_fusion:
        logits *= (weight * job.share / outside)[:, None]
    else:
        other, total = 1 - weight, slope.sum(1)
        bucket = weight * tail.exp() + other * (slope[:, -1] - tail.exp() * total)
        logits *= torch.where(outside > 0, bucket * job.share / outside, 0)[:, None]
        p = (kept.logits - log_z[:, None]).exp() * ((weight - other * total) * job.share)[:, None]
        logits.scatter_(1, kept.ids, torch.where(kept.has_entries, p, logits.gather(1, kept.ids)))
        logits.scatter_add_(1, kept.ids, torch.where(kept.is_entry, slope[:, :-1] * (other * job.share)[:, None], 0))
    if smooth:
        logits -= (weight * job.share * smooth / logits.shape[1])[:, None]
    logits.scatter_add_(1, gold, (-weight * job.share * (1 - smooth))[:, None])
    return clm, fusion


class _FusedOutcomes(NamedTuple):
    """Hold a block's fused entries beside its logits; padding repeats a row's first entry."""

    ids: Int[Tensor, "rows k"]
    is_entry: Bool[Tensor, "rows k"]  # otherwise padding
    has_entries: Bool[Tensor, "rows 1"]
    logprobs: Float[Tensor, "rows k"]
    tail: Float[Tensor, "rows"]
    logits: Float[Tensor, "rows k"]

    @staticmethod
    def gather(fused: FusedRows, logits: Float[Tensor, "rows vocab"]) -> "_FusedOutcomes":
        """Gather the logits of the fused rows' entries."""
        is_entry = fused.logprobs > -torch.inf
        ids = torch.where(is_entry, fused.ids, fused.ids.gather(1, is_entry.int().argmax(dim=1, keepdim=True)))
        logprobs, tail = fused.logprobs.to(logits.dtype), fused.tail.to(logits.dtype)
        has_entries = is_entry.any(dim=1, keepdim=True)
        return _FusedOutcomes(ids, is_entry, has_entries, logprobs, tail, logits.gather(1, ids))

    def mask_padding(self) -> Float[Tensor, "rows k"]:
        """Return the entries' logits, with -inf for padding."""
        return torch.where(self.is_entry, self.logits, -torch.inf)

    def sum_others(self, values: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows"]:
        """Sum each row's values except for those of its entries. `values` change and are restored."""
        own = values.gather(1, self.ids)
        result = values.scatter_(1, self.ids, torch.where(self.has_entries, 0, own)).sum(1)
        values.scatter_(1, self.ids, own)
        return result

    def pair_outcomes(self, log_z: Float[Tensor, "rows"], tail: Float[Tensor, "rows"]) -> tuple[Tensor, Tensor]:
        """Return log q and log p of the kept entries and the bucket, whose log p is `tail`; log p is at least -1e4."""
        logp = torch.cat([self.mask_padding() - log_z[:, None], tail[:, None]], dim=1)
        least = torch.where(torch.cat([self.is_entry, torch.ones_like(self.has_entries)], dim=1), -1e4, -torch.inf)
        return torch.cat([self.logprobs, self.tail.log()[:, None]], dim=1), logp.maximum(least.to(logp.dtype))
