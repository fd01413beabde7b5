"""The fusion objective on sparse rows: L = lambda * CE(gold) + (1 - lambda) * KL(fused || target).

Wan et al. 2024, section 3.4; DESIGN.md section 6. Forward KL, the tail taken as one bucket: with kept ids K, fused
probabilities q, the target's p, and tails q_t = 1 - sum_K q, p_t = 1 - sum_K p,

    KL = sum_K q_k (log q_k - log p_k) + q_t (log q_t - log p_t)

so that with logits z, dKL/dz_v = p_v - q_v for v in K and p_v (1 - q_t / p_t) elsewhere. Loss and gradient are made in
one pass over chunks of tokens: neither [tokens, vocab] logits nor a dense teacher ever exist.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fuselm.forward import OutputLayer, chunks, logsumexp, product_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRows:
    """Fused distributions of some tokens, padded to one width; log-probability -inf marks padding."""

    ids: Int[Tensor, "tokens k"]
    logprobs: Float[Tensor, "tokens k"]
    tail: Float[Tensor, "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Sums over tokens, in nats. Only `total` has a gradient."""

    total: Float[Tensor, ""]
    clm: Float[Tensor, ""]
    fusion: Float[Tensor, ""]


def fusion_loss(
    hidden: Float[Tensor, "tokens hidden"],
    layer: OutputLayer,
    gold: Int[Tensor, "tokens"],
    fused: FusedRows | None,
    lambda_clm: float,
) -> Loss:
    """The objective, summed over tokens. Without `fused` it is the causal-LM loss: bit for bit that of lambda 1."""
    needs_gradient = torch.is_grad_enabled()  # always off inside an autograd.Function
    total, clm, fusion = _FusionLoss.apply(
        hidden, layer.weight, layer.bias, layer, gold, fused, lambda_clm, needs_gradient
    )
    return Loss(total=total, clm=clm, fusion=fusion)


class _FusionLoss(torch.autograd.Function):
    """The gradient is known once the loss is: forward makes both, backward hands it out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, layer, gold, fused, lambda_clm, needs_gradient):
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return _forward(ctx, hidden, weight, bias, layer, gold, fused, lambda_clm, needs_gradient, dtype)

    @staticmethod
    def backward(ctx, grad_total, _grad_clm, _grad_fusion):
        hidden, weight, bias = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None, None, None


def _forward(ctx, hidden, weight, bias, layer, gold, fused, lambda_clm, needs_gradient, dtype):
    clm, fusion = hidden.new_zeros((), dtype=_sum_type(hidden)), hidden.new_zeros((), dtype=_sum_type(hidden))
    needs = needs_gradient and any(ctx.needs_input_grad[:3])
    grad_hidden = torch.zeros_like(hidden) if needs else None
    grad_weight = torch.zeros_like(weight) if needs and weight is not None else None
    grad_bias = torch.zeros_like(bias) if needs and bias is not None else None
    cast_weight = None if weight is None else weight.to(dtype)
    vocab = hidden.shape[-1] if weight is None else weight.shape[0]
    for rows in chunks(len(hidden), vocab):
        h = hidden[rows].to(dtype)
        logits, slope = _logits(h, cast_weight, bias, layer)
        clm_rows, fusion_rows, g = _rows_loss(logits, gold[rows], _chunk(fused, rows), lambda_clm)
        clm += clm_rows.sum()
        fusion += fusion_rows.sum()
        if not needs:
            continue
        if slope is not None:
            g *= slope
        if weight is None:
            grad_hidden[rows] = g.to(hidden.dtype)
            continue
        g_cast = g.to(dtype)
        grad_hidden[rows] = (g_cast @ cast_weight).to(hidden.dtype)
        grad_weight += g_cast.T @ h
        if bias is not None:
            grad_bias += g.sum(0).to(bias.dtype)
    ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
    ctx.mark_non_differentiable(clm, fusion)
    return (clm.clone() if fused is None else lambda_clm * clm + (1 - lambda_clm) * fusion), clm, fusion


def _sum_type(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunk(fused: FusedRows | None, rows: slice) -> FusedRows | None:
    if fused is None:
        return None
    return FusedRows(ids=fused.ids[rows], logprobs=fused.logprobs[rows], tail=fused.tail[rows])


def _logits(
    h: Float[Tensor, "rows hidden"], weight: Tensor | None, bias: Tensor | None, layer: OutputLayer
) -> tuple[Float[Tensor, "rows vocab"], Tensor | float | None]:
    """Logits, and their slope in what the linear map gave (None: 1)."""
    logits = h if weight is None else h @ weight.T
    logits = logits.to(_sum_type(h)).clone() if weight is None else logits.to(_sum_type(h))
    if bias is not None:
        logits += bias.to(logits.dtype)
    slope = None
    if layer.scale != 1.0:
        logits *= layer.scale
        slope = layer.scale
    if layer.soft_cap is not None:
        logits = layer.soft_cap * torch.tanh(logits / layer.soft_cap)
        slope = (slope or 1.0) * (1 - (logits / layer.soft_cap) ** 2)
    return logits, slope


def _rows_loss(
    logits: Float[Tensor, "rows vocab"], gold: Int[Tensor, "rows"], fused: FusedRows | None, lambda_clm: float
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "rows vocab"]]:
    """Both terms of each row, and the gradient of their weighted sum in the logits (in the logits' own memory)."""
    log_z = logsumexp(logits)
    gold = gold[:, None]
    clm = log_z - logits.gather(1, gold)[:, 0]
    if fused is None:
        g = logits.sub_(log_z[:, None]).exp_()
        g.scatter_add_(1, gold, torch.full_like(clm, -1.0)[:, None])
        return clm, torch.zeros_like(clm), g

    q, tail = fused.logprobs.to(logits.dtype).exp(), fused.tail.to(logits.dtype)
    real = q > 0
    some = real.any(dim=1, keepdim=True)
    ids = torch.where(real, fused.ids, fused.ids.gather(1, real.int().argmax(dim=1, keepdim=True)))  # padding repeats
    log_p = logits.gather(1, ids) - log_z[:, None]
    entropy = torch.where(real, q * fused.logprobs.to(logits.dtype), 0).sum(1) + torch.xlogy(tail, tail)
    cross = torch.where(real, q * log_p, 0).sum(1)

    p = logits.sub_(log_z[:, None]).exp_()
    p_kept = p.gather(1, ids)
    p.scatter_(1, ids, torch.where(some, 0, p_kept))
    p_tail = p.sum(1).clamp_min(torch.finfo(p.dtype).tiny)
    fusion = entropy - cross - torch.xlogy(tail, p_tail)

    outside = lambda_clm + (1 - lambda_clm) * (1 - tail / p_tail)
    p *= outside[:, None]
    p.scatter_(1, ids, torch.where(some, p_kept, p.gather(1, ids)))
    p.scatter_add_(1, ids, torch.where(real, -(1 - lambda_clm) * q, 0))
    p.scatter_add_(1, gold, torch.full_like(clm, -lambda_clm)[:, None])
    return clm, fusion, p
