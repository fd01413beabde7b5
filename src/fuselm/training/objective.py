"""The fusion objective on sparse rows: L = lambda * CE(gold) + (1 - lambda) * D(fused || target).

Wan et al. 2024, section 3.4; DESIGN.md section 6. A row's kept ids K and the rest as one bucket are its outcomes: the
fused q on them, and the target's p, whose bucket is all that it gives to ids outside K. A divergence compares those, so
it sees k + 1 numbers a token and no vocabulary. With d_k = dD/dlog p_k and S = sum_k d_k (bucket and all),

    dD/dz_v = d_v - p_v S for v in K,    p_v / p_bucket * (d_bucket - p_bucket S) elsewhere

so the gradient in the logits z is a softmax times one number a row, but for K and the gold id. Loss and gradient are
made in one pass over chunks of tokens: neither [tokens, vocab] logits in float32 nor a dense teacher ever exist.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fuselm.models.forward import OutputLayer, chunks, product_dtype

PRODUCT_BYTES = 1 << 28  # of a chunk's logits, in the type of the matrix products
BLOCK_BYTES = 1 << 22  # of the rows whose logits are in float32 at a time on a CPU: they stay in its cache
DEVICE_BLOCK_BYTES = 1 << 27  # elsewhere: few launches for a chunk (not measured)
TILE = 8192  # rows of the output layer's gradient that are added at a time
FLOOR = 1e-6  # a fused probability of 0 would make the reverse KL infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRows:
    """Fused distributions of some tokens, padded to one width; log-probability -inf marks padding. A row's ids are
    distinct, as in `Distributions`: of one that is there twice the mass would count twice.
    """

    ids: Int[Tensor, "tokens k"]
    logprobs: Float[Tensor, "tokens k"]
    tail: Float[Tensor, "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Sums over tokens, in nats, over `count`. Only `total` has a gradient."""

    total: Float[Tensor, ""]
    clm: Float[Tensor, ""]
    fusion: Float[Tensor, ""]


class Slopes(NamedTuple):
    """A divergence of each row, and its slope in each log p."""

    value: Float[Tensor, "rows"]
    slope: Float[Tensor, "rows outcomes"]


def forward_kl(
    logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"], beta: float | None = None
) -> Slopes:
    """KL(q || p): the target is to give mass wherever the fused row does. The paper's."""
    q = logq.exp()
    return Slopes(_weighted(q, logq - logp), -q)


def reverse_kl(
    logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"], beta: float | None = None
) -> Slopes:
    """KL(p || q): the target is to give mass nowhere that the fused row does not. q counts as `FLOOR` at least."""
    p, ratio = logp.exp(), logp - logq.clamp_min(math.log(FLOOR))
    return Slopes(_weighted(p, ratio), torch.where(p > 0, p * (ratio + 1), 0))


def jsd(logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"], beta: float | None) -> Slopes:
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Agarwal et al. 2024, GKD)."""
    assert beta is not None
    q, p = logq.exp(), logp.exp()
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))  # q and p may both be too small for exp
    ratio = torch.where(p > 0, p * (logp - logm), 0)
    return Slopes(beta * _weighted(q, logq - logm) + (1 - beta) * ratio.sum(1), (1 - beta) * ratio)


DIVERGENCES: dict[str, Callable[..., Slopes]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.where(weights > 0, weights * values, 0).sum(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """D(fused || target), by name, and how tails and temperature enter it.

    `tail`: as a `bucket`, an outcome like others; or `renormalise`, the paper's: the fused row's kept entries are made
    to sum to 1, so that the target's bucket is to get nothing.

    `temperature` T flattens what is compared: kept entries and bucket of both rows to the power of 1/T, renormalised,
    the divergence times T^2 so that its gradient keeps its size (Hinton et al. 2015). Nothing is known of single ids
    outside K, so the bucket is flattened as one outcome, in the fused row and the target alike. docs/paper.md says what
    that approximates.
    """

    name: str = "forward_kl"
    beta: float | None = None  # of jsd
    temperature: float = 1.0
    tail: str = "bucket"

    def __call__(self, logq: Float[Tensor, "rows outcomes"], logp: Float[Tensor, "rows outcomes"]) -> Slopes:
        """Of rows with their bucket as the last outcome; -inf is no outcome."""
        if self.tail == "renormalise":
            kept = torch.logsumexp(logq[:, :-1], dim=1, keepdim=True)
            logq = torch.where(kept > -torch.inf, torch.cat([logq[:, :-1] - kept, logq[:, -1:] - torch.inf], 1), logq)
        if self.temperature == 1.0:
            return DIVERGENCES[self.name](logq, logp, self.beta)
        t = self.temperature
        logq, logp = torch.log_softmax(logq / t, dim=1), torch.log_softmax(logp / t, dim=1)
        value, slope = DIVERGENCES[self.name](logq, logp, self.beta)
        return Slopes(t * t * value, t * (slope - logp.exp() * slope.sum(1, keepdim=True)))


def expected_probability(fused: FusedRows, gold: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """That a row expects the token that comes to have, if it is right: the sum of squares. Ids not kept add nothing."""
    return (2 * fused.logprobs).exp().sum(1)


def gold_probability(fused: FusedRows, gold: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """That a row gives to the token that comes; 0 if it was not kept."""
    return torch.where(fused.ids == gold[:, None], fused.logprobs.exp(), 0).sum(1)


# How far a fused row is to be trusted, from 0 to 1.
CONFIDENCES: dict[str, Callable[..., Tensor]] = {"expected": expected_probability, "gold": gold_probability}


def fusion_loss(
    hidden: Float[Tensor, "tokens hidden"],
    layer: OutputLayer,
    gold: Int[Tensor, "tokens"],
    fused: FusedRows | None,
    lambda_clm: float | Float[Tensor, "tokens"],
    divergence: Divergence = Divergence(),
    *,
    count: float | Tensor = 1.0,
) -> Loss:
    """The objective, summed over tokens, over `count` (their number, for a mean). `lambda_clm` may differ by token.

    Without `fused` it is the causal-LM loss: bit for bit that of lambda 1.
    """
    needs_gradient = torch.is_grad_enabled()  # always off inside an autograd.Function
    weights = hidden.new_ones(len(hidden), dtype=_sum_type(hidden))
    if fused is not None:
        weights = weights * lambda_clm
    job = _Job(layer, gold, fused, weights, divergence, 1.0 / count, bool((weights != 1).any()))
    total, clm, fusion = _FusionLoss.apply(hidden, layer.weight, layer.bias, job, needs_gradient)
    return Loss(total=total, clm=clm, fusion=fusion)


class _Job(NamedTuple):
    """What has no gradient."""

    layer: OutputLayer
    gold: Int[Tensor, "tokens"]
    fused: FusedRows | None
    lambda_clm: Float[Tensor, "tokens"]
    divergence: Divergence
    share: float | Tensor  # of one token in the loss
    steers: bool  # whether `fused` has any weight; else it is only told how far from it the target is

    def rows(self, rows: slice) -> "_Job":
        fused = self.fused
        if fused is not None:
            fused = FusedRows(ids=fused.ids[rows], logprobs=fused.logprobs[rows], tail=fused.tail[rows])
        return self._replace(gold=self.gold[rows], fused=fused, lambda_clm=self.lambda_clm[rows])


class _FusionLoss(torch.autograd.Function):
    """The gradient is known once the loss is: forward makes both, backward hands it out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, job, needs_gradient):
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            needs = tuple(needs_gradient and need for need in ctx.needs_input_grad[:3])
            terms, gradients = _loss(hidden, weight, bias, job, dtype, needs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*terms[1:])
        return terms

    @staticmethod
    def backward(ctx, grad_total, _grad_clm, _grad_fusion):
        gradients = ctx.saved_tensors
        if grad_total != 1:  # `share` has done it already, where the loss is not scaled any more
            gradients = [None if g is None else g * grad_total.to(g.dtype) for g in gradients]
        return *gradients, None, None


def _loss(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"] | None,
    bias: Float[Tensor, "vocab"] | None,
    job: _Job,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]]:
    """The loss and its terms; those gradients of `hidden`, `weight` and `bias` that it `needs`."""
    terms = hidden.new_zeros(3, dtype=_sum_type(hidden))
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    block_bytes = BLOCK_BYTES if hidden.device.type == "cpu" else DEVICE_BLOCK_BYTES
    if weight is None:
        for rows in chunks(len(hidden), hidden.shape[-1], block_bytes // 4):
            logits = hidden[rows].to(terms.dtype, copy=True)
            terms += _block(logits, None, job.rows(rows))
            if grad_hidden is not None:
                grad_hidden[rows] = logits
        return terms.unbind(), [grad_hidden, None, None]

    grad_weight = torch.zeros_like(weight) if needs[1] else None
    grad_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
    cast_weight = weight.to(dtype)
    vocab = len(weight)
    product = None
    for rows in chunks(len(hidden), vocab, PRODUCT_BYTES // dtype.itemsize):
        h = hidden[rows].to(dtype)
        product = hidden.new_empty(len(h), vocab, dtype=dtype) if product is None else product[: len(h)]
        torch.mm(h, cast_weight.T, out=product)
        part = job.rows(rows)
        for block in chunks(len(h), vocab, block_bytes // terms.dtype.itemsize):
            logits = product[block].to(terms.dtype)  # the product's own memory, if that is its type
            terms += _block(logits, bias, part.rows(block))
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


def _sum_type(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _block(logits: Float[Tensor, "rows vocab"], bias: Tensor | None, job: _Job) -> Float[Tensor, "3"]:
    """Total, causal-LM and fusion loss of a few rows of the linear map's output; that becomes the total's gradient."""
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
    clm, fusion = _rows_loss(logits, job)
    if slope is not None:
        logits *= slope
    if layer.scale != 1.0:
        logits *= layer.scale
    total = job.lambda_clm * clm + (1 - job.lambda_clm) * fusion
    return torch.stack([total.sum(), clm.sum(), fusion.sum()]) * job.share


def _rows_loss(logits: Float[Tensor, "rows vocab"], job: _Job) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Both terms of each row; the gradient of their weighted sum takes the logits' memory."""
    fused, gold, weight = job.fused, job.gold[:, None], job.lambda_clm
    gold_logit = logits.gather(1, gold)[:, 0]
    kept = None if fused is None else _Kept.of(fused, logits)
    if kept is not None and job.steers:
        logits.scatter_(1, kept.ids, torch.where(kept.some, -torch.inf, kept.logits))

    largest = logits.amax(dim=1)
    shift = torch.where(largest.isfinite(), largest, 0)
    outside = logits.sub_(shift[:, None]).exp_().sum(1)
    log_z = log_outside = outside.log() + shift
    if kept is None:
        fusion = torch.zeros_like(log_z)
    else:
        if job.steers:
            log_z = torch.logaddexp(log_outside, torch.logsumexp(kept.real_logits(), dim=1))
        else:
            log_outside = kept.sum_of_others(logits).log() + shift
        tail = log_outside - log_z
        fusion, slope = job.divergence(*kept.outcomes(log_z, tail))
    clm = log_z - gold_logit

    if kept is None or not job.steers:
        logits *= (weight * job.share / outside)[:, None]
    else:
        other, total = 1 - weight, slope.sum(1)
        bucket = weight * tail.exp() + other * (slope[:, -1] - tail.exp() * total)
        logits *= torch.where(outside > 0, bucket * job.share / outside, 0)[:, None]
        p = (kept.logits - log_z[:, None]).exp() * ((weight - other * total) * job.share)[:, None]
        logits.scatter_(1, kept.ids, torch.where(kept.some, p, logits.gather(1, kept.ids)))
        logits.scatter_add_(1, kept.ids, torch.where(kept.real, slope[:, :-1] * (other * job.share)[:, None], 0))
    logits.scatter_add_(1, gold, (-weight * job.share)[:, None])
    return clm, fusion


class _Kept(NamedTuple):
    """A block's fused entries beside its logits; padding repeats the row's first entry."""

    ids: Int[Tensor, "rows k"]
    real: Bool[Tensor, "rows k"]  # not padding
    some: Bool[Tensor, "rows 1"]  # rows that have entries
    logprobs: Float[Tensor, "rows k"]
    tail: Float[Tensor, "rows"]
    logits: Float[Tensor, "rows k"]

    @staticmethod
    def of(fused: FusedRows, logits: Float[Tensor, "rows vocab"]) -> "_Kept":
        real = fused.logprobs > -torch.inf
        ids = torch.where(real, fused.ids, fused.ids.gather(1, real.int().argmax(dim=1, keepdim=True)))
        logprobs, tail = fused.logprobs.to(logits.dtype), fused.tail.to(logits.dtype)
        return _Kept(ids, real, real.any(dim=1, keepdim=True), logprobs, tail, logits.gather(1, ids))

    def real_logits(self) -> Float[Tensor, "rows k"]:
        return torch.where(self.real, self.logits, -torch.inf)

    def sum_of_others(self, values: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows"]:
        own = values.gather(1, self.ids)
        result = values.scatter_(1, self.ids, torch.where(self.some, 0, own)).sum(1)
        values.scatter_(1, self.ids, own)
        return result

    def outcomes(self, log_z: Float[Tensor, "rows"], tail: Float[Tensor, "rows"]) -> tuple[Tensor, Tensor]:
        """log q and log p of the kept entries and the bucket, whose log p is `tail`. No log p below the least float."""
        logp = torch.cat([self.real_logits() - log_z[:, None], tail[:, None]], dim=1)
        least = torch.where(torch.cat([self.real, torch.ones_like(self.some)], dim=1), -1e4, -torch.inf)
        return torch.cat([self.logprobs, self.tail.log()[:, None]], dim=1), logp.maximum(least.to(logp.dtype))
