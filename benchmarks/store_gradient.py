"""Measure what a retention policy costs a student: KL to the full distribution, the angle between gradients.

The source reads documents; the student is the same model, which does not see the first `HIDDEN` tokens of each. For the
tokens after those, the gradient of the distillation loss in all parameters of the student is made once from the full
distributions and once from what each policy stores of them, by the way of the store's own rows and their rounding.

Beside them, on the same rows: the top 10 as float32 (FuseLLM's), the renormalised top 50, and DistillKit's two
published layouts, computed as its `logprob_compressor` does: the first `exact_k` log-probabilities in bfloat16, for the
others a least squares fit in float32 of the given terms of their rank, no residuals, and ids of ceil(log2 V) bits; once
with its loss's `zero` (nothing is known outside the entries) and once with `symmetric_uniform` (one bucket).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.models.loading import load_model
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores import retention, store
from fuselm.stores.distributions import Distributions
from fuselm.stores.retention import Policy, RetainedEntries
from fuselm.stores.rows import read_traces

HIDDEN, LENGTH = 64, 64
DISTILLKIT = {50: (1, [0, 1, 0.5]), 128: (16, [0, 1, 2, 3, 4, 0.5])}  # k: exact_k, powers of the rank
# Beside the default: (name, options).
POLICIES = [
    *({"policy": "threshold", "threshold": t} for t in (0.003, 0.0065, 0.01)),
    *({"policy": "top_k", "top_k": k} for k in (8, 16, 32, 64)),
    *({"policy": "nucleus", "mass": 0.9, "top_k": k} for k in (16, 64)),
    *({"policy": "sampled", "draws": n} for n in (16, 28, 50)),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Hold what a student is taught, row by row; a tail is a bucket, or None: nothing is known beyond the entries."""

    ids: Tensor  # rows entries; padding has probability 0
    probs: Tensor
    tail: Tensor | None
    bytes_per_token: float | None = None  # by formula, of ids and values alone
    head: "Target | None" = None  # without what was drawn, the tail as its mass


def label(options: dict) -> str:
    return " ".join(str(value) for value in options.values())


def measure(model: Model, vocabulary: Vocabulary, documents: Sequence[Document]) -> dict:
    """Return for each policy `kl` (the tail spread evenly over all other ids), `angle` in degrees, entries a token.

    Of draws, KL is taken of the head and its tail, and the angle of what they stand for.
    """
    loaded = load_model(model, dtype="float32").eval()
    layer = forward.find_output_layer(loaded)
    texts = [vocabulary.segment(d.text).ids[: HIDDEN + LENGTH] for d in documents]
    texts = [ids for ids in texts if len(ids) == HIDDEN + LENGTH]
    with torch.inference_mode():
        hidden = forward.compute_hidden_states(loaded, layer, *forward.pad_inputs(texts, model.context_token))[
            :, HIDDEN:
        ]
        logits = layer.compute_logits(hidden.flatten(0, 1))
    full = torch.log_softmax(logits, dim=-1)
    gold = torch.as_tensor(np.concatenate([ids[HIDDEN:] for ids in texts]), dtype=torch.long)
    inputs, mask = forward.pad_inputs([ids[HIDDEN:] for ids in texts], model.context_token)
    student = forward.compute_hidden_states(loaded, layer, inputs, mask).flatten(0, 1)
    with torch.no_grad():
        own = torch.softmax(layer.compute_logits(student), dim=-1)

    parameters = list(loaded.parameters())
    exact = _gradient(student, own - full.exp(), layer.weight, parameters)
    result = {}
    for name, target in _targets(logits, full, gold).items():
        found = _gradient(student, _slope(own, target), layer.weight, parameters)
        result[name] = {
            "entries": float((target.probs > 0).sum(dim=1).float().mean()),
            "kl": _kl(full, target.head or target),
            "angle": _angle(exact, found),
        } | ({"bytes_per_token": target.bytes_per_token} if target.bytes_per_token else {})
    return {"tokens": len(full), "policies": result}


def _targets(logits: Tensor, full: Tensor, gold: Tensor) -> dict[str, Target]:
    """Return all targets by name; `full` holds log-probabilities, `gold` the ids that came."""
    result = {}
    found = forward.survey_logits(logits)
    for options in POLICIES:
        uniform = retention.draw_uniforms("benchmark", len(logits))
        kept = retention.retain_entries(Policy(**options), logits, found, gold=gold, uniform=uniform)
        head = _stored(kept, draws=False) if options["policy"] == "sampled" else None
        result[label(options)] = replace(_stored(kept), head=head)
    values, ids = full.topk(max(*DISTILLKIT, 50), dim=-1)
    for k in (10, 50):
        probs = values[:, :k].exp()
        size = 8.0 * k
        result[f"raw float32 top {k}"] = Target(
            ids=ids[:, :k], probs=probs, tail=1 - probs.sum(dim=1), bytes_per_token=size
        )
        probs = probs / probs.sum(dim=1, keepdim=True)
        result[f"renormalised float32 top {k}"] = Target(ids=ids[:, :k], probs=probs, tail=None, bytes_per_token=size)
    for k, (exact, powers) in DISTILLKIT.items():
        probs = _distillkit(values[:, :k], exact, powers).exp()
        size = 2 * exact + 4 * len(powers) + math.ceil(k * math.ceil(math.log2(full.shape[1])) / 8)
        for handling, tail in (("zero", None), ("symmetric_uniform", (1 - probs.sum(dim=1)).clamp(min=0))):
            result[f"DistillKit {k} {handling}"] = Target(ids=ids[:, :k], probs=probs, tail=tail, bytes_per_token=size)
    return result


def _distillkit(logprobs: Tensor, exact: int, powers: list[float]) -> Tensor:
    """Return log-probabilities, largest first, as they come back from DistillKit's layout."""
    rest = logprobs[:, exact:]
    rank = torch.arange(rest.shape[1], dtype=torch.float32)
    terms = torch.stack([rank**power for power in powers], dim=1)
    fit = terms @ (torch.linalg.pinv(terms.double()) @ rest.double().T).float()
    return torch.cat([logprobs[:, :exact].bfloat16().float(), fit.T], dim=1)


def _stored(kept: RetainedEntries, *, draws: bool = True) -> Target:
    """Round rows as the store does."""
    rows, zeros = len(kept.counts), np.zeros(len(kept.counts), np.int32)
    trace = store.Trace(
        document="",
        size=0,
        nats=0.0,
        tokens=zeros,
        starts=zeros,
        distributions=Distributions(
            offsets=np.append(0, np.cumsum(kept.counts)),
            ids=kept.ids,
            logprobs=kept.logprobs,
            gold=zeros.astype(np.float32),
            tail=kept.tail,
        ),
        weights=np.zeros((rows, 0), np.float32),
    )
    (back,) = read_traces(store.build_table([trace]), draws=draws)
    d = back.distributions
    real = np.arange(d.counts.max()) < d.counts[:, None]
    ids, probs = np.zeros(real.shape, np.int64), np.zeros(real.shape, np.float32)
    ids[real], probs[real] = d.ids, np.exp(d.logprobs)
    return Target(ids=torch.from_numpy(ids), probs=torch.from_numpy(probs), tail=torch.from_numpy(d.tail))


def _slope(own: Tensor, target: Target) -> Tensor:
    """Return the gradient of a row's loss in its logits; `own` holds the student's probabilities."""
    real = target.probs > 0
    ids = torch.where(real, target.ids, target.ids[:, :1])  # padding repeats the first
    kept = own.gather(1, ids)
    if target.tail is None:  # sum q (log q - log p), over the entries alone
        return (own * target.probs.sum(dim=1, keepdim=True)).scatter_add_(1, ids, -target.probs)
    outside = (1 - torch.where(real, kept, 0).sum(dim=1)).clamp(min=1e-9)
    slope = own * (1 - target.tail / outside)[:, None]
    slope.scatter_(1, ids, kept)
    return slope.scatter_add_(1, ids, -target.probs)


def _gradient(hidden: Tensor, slope: Tensor, weight: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Return the gradient of all parameters, the mean over tokens; a tied output layer counts once."""
    with torch.no_grad():
        of_hidden = slope @ weight / len(slope)
        of_weight = slope.T @ hidden / len(slope)
    found = torch.autograd.grad(hidden, parameters, of_hidden, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    found[next(i for i, p in enumerate(parameters) if p is weight)] += of_weight
    return found


def _angle(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the angle between two gradients in degrees."""

    def product(left: list[Tensor], right: list[Tensor]) -> float:
        return sum(float(torch.dot(a.flatten(), b.flatten())) for a, b in zip(left, right, strict=True))

    cosine = product(one, other) / math.sqrt(product(one, one) * product(other, other))
    return math.degrees(math.acos(min(cosine, 1.0)))


def _kl(full: Tensor, target: Target) -> float | None:
    """Return KL(full || target) with the tail spread evenly, or None if it is infinite."""
    if target.tail is None or bool((target.tail == 0).any()):
        return None
    count = (target.probs > 0).sum(dim=1)
    log_spread = (target.tail / (full.shape[1] - count)).log()
    real = target.probs > 0
    kept = torch.where(real, full.gather(1, target.ids).exp(), 0)
    gain = torch.where(real, kept * (target.probs.clamp(min=1e-30).log() - log_spread[:, None]), 0).sum(dim=1)
    return float(((full.exp() * full).sum(dim=1) - log_spread - gain).mean())
