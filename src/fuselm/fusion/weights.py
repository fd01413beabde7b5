"""Compute the weight of each source at each token (docs/paper.md; Wan et al. 2024, section 3.3).

`min_ce`, `avg_ce` and `log_linear` use how well a source predicts the text: its cross-entropy in nats per byte, over
the document (as in the paper), over a window or at the token. At document level this is the source's own cross-entropy,
in its own vocabulary; below document level it is that of its aligned distributions. So these weights depend on the
token that comes. The others do not: `entropy` uses how certain each source is, and `bayes` how well it has predicted
the document so far.

A source without information about a token has weight 0 there, and so has a source whose prior weight is 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm.fusion import tails
from fuselm.fusion.sorted_sums import sum_sorted
from fuselm.stores.store import Trace
from fuselm.system.compiling import compiled

Matrix = Float[ndarray, "tokens sources"]
LEAST_GAIN = 1e-9  # nats a token; `learn_weights` stops when a step gains less
MOST_STEPS = 1000
WORST = 1e300  # nats, the cost of an impossible token


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Hold the inputs of a weight function.

    `allowed` says which sources may have weight at a token, and `prior` holds their initial weights. `window` is in
    bytes; `sharpness` belongs to `avg_ce` and `switch` to `bayes`.
    """

    traces: Sequence[Trace]
    allowed: Bool[ndarray, "tokens sources"]
    prior: Float[ndarray, "sources"]
    level: str
    window: int
    sharpness: float
    switch: float
    vocabulary_size: int


def choose_by_cross_entropy(evidence: Evidence) -> Matrix:
    """Choose the source of the least cross-entropy (the paper's MinCE); equal sources share the weight."""
    return _choose_least(_compute_cross_entropies(evidence, evidence.level), evidence.allowed)


def weigh_by_cross_entropy(evidence: Evidence) -> Matrix:
    """Weight sources by prior times exp(-sharpness * cross-entropy), the paper's AvgCE.

    The paper uses sharpness 1; sharpness 0 returns the prior.
    """
    return _softmax(_compute_cross_entropies(evidence, evidence.level), evidence)


def weigh_by_entropy(evidence: Evidence) -> Matrix:
    """Weight sources as `avg_ce` does, but by their own uncertainty in nats a token, which ignores the text."""
    nats = np.stack([tails.compute_entropy(t.distributions, evidence.vocabulary_size) for t in evidence.traces], axis=1)
    return _softmax(_average_by_level(nats, np.ones(len(nats), np.int64), evidence, evidence.level), evidence)


def weigh_by_posterior(evidence: Evidence) -> Matrix:
    """Return the posterior of each source given the document before the token.

    Another source takes over with probability `switch` (Herbster and Warmuth 1998, fixed share). A source without
    information about a token keeps its weight (Freund et al. 1997, specialists).
    """
    gold = np.stack([t.distributions.gold.astype(np.float64) for t in evidence.traces], axis=1)
    if gold.shape != evidence.allowed.shape or evidence.prior.shape != gold.shape[1:]:
        raise ValueError(f"weights: golds of {gold.shape}, {evidence.allowed.shape} allowed, {evidence.prior.shape}")
    return _track(gold, evidence.allowed, _normalize(evidence.prior[None])[0], evidence.switch)


def weigh_by_prior(evidence: Evidence) -> Matrix:
    """Return the prior wherever a source is allowed to have weight."""
    return _softmax(np.zeros(evidence.allowed.shape), evidence)


def choose_by_token(evidence: Evidence) -> Matrix:
    """Choose the best source of each token, for diagnosis; no other weights give the text a greater probability."""
    return _choose_least(_compute_cross_entropies(evidence, "token"), evidence.allowed)


WEIGHT_FUNCTIONS: dict[str, Callable[[Evidence], Matrix]] = {
    "min_ce": choose_by_cross_entropy,
    "avg_ce": weigh_by_cross_entropy,
    "log_linear": weigh_by_cross_entropy,  # the same weights, for a geometric mean
    "entropy": weigh_by_entropy,
    "bayes": weigh_by_posterior,
    "fixed": weigh_by_prior,
    "oracle": choose_by_token,
}


def learn_weights(
    gold: Matrix, allowed: Bool[ndarray, "tokens sources"], prior: Float[ndarray, "sources"]
) -> Float[ndarray, "sources"]:
    """Find the fixed weights whose mixture gives a text the greatest probability, starting from `prior`.

    Expectation maximization finds them. The text's log-probability is concave in the weights, so these are the best. A
    source without information about a token is assumed to agree there with the others.
    """
    weights = _normalize(prior[None])[0]
    likely = np.where(allowed, np.exp(gold), 0.0)
    is_possible = (likely * (weights > 0)).any(axis=1)
    likely, allowed = likely[is_possible], allowed[is_possible]
    before = -np.inf
    for _ in range(MOST_STEPS):
        awake = (allowed * weights).sum(axis=1)
        mixed = likely @ weights
        now = float(np.mean(np.log(mixed / awake))) if len(mixed) else before
        if now - before < LEAST_GAIN or not len(mixed):
            break
        before = now
        weights = weights * np.where(allowed, likely * (awake / mixed)[:, None], 1.0).mean(axis=0)
        weights /= weights.sum()
    return weights


def _compute_cross_entropies(evidence: Evidence, level: str) -> Matrix:
    traces = evidence.traces
    if level == "document":
        nats = np.array([t.nats / max(t.size, 1) for t in traces])
        return np.broadcast_to(nats, evidence.allowed.shape)
    gold = np.stack([t.distributions.gold for t in traces], axis=1).astype(np.float64)
    return _average_by_level(np.minimum(-gold, WORST), traces[0].lengths, evidence, level)


def _average_by_level(nats: Matrix, units: Int[ndarray, "tokens"], evidence: Evidence, level: str) -> Matrix:
    """Average nats per unit over all of a source's tokens in the same document, window or token."""
    if level == "token":
        return nats / np.maximum(units, 1)[:, None]
    starts = np.maximum(evidence.traces[0].starts, 0)
    windows = starts // evidence.window if level == "window" else np.zeros_like(starts)
    out = np.empty(nats.shape)
    for s, allowed in enumerate(evidence.allowed.T):
        total = np.bincount(windows, weights=np.where(allowed, nats[:, s], 0.0))
        count = np.bincount(windows, weights=np.where(allowed, units, 0))
        out[:, s] = (total / np.maximum(count, 1))[windows]
    return out


def _choose_least(costs: Matrix, allowed: Bool[ndarray, "tokens sources"]) -> Matrix:
    costs = np.where(allowed, np.minimum(costs, WORST), np.inf)
    return _normalize((allowed & (costs == costs.min(axis=1, keepdims=True))).astype(np.float64))


def _softmax(costs: Matrix, evidence: Evidence) -> Matrix:
    allowed = evidence.allowed
    costs = np.where(allowed, np.minimum(costs, WORST), np.inf)
    least = np.where(allowed.any(axis=1), costs.min(axis=1), 0.0)[:, None]
    with np.errstate(over="ignore"):
        beyond = -evidence.sharpness * np.where(allowed, costs - least, 0.0)
    return _normalize(np.where(allowed, evidence.prior * np.exp(beyond), 0.0))


def _normalize(weights: Matrix) -> Matrix:
    """Divide weights by their sum; the order of the sum does not depend on the order of the sources."""
    total = sum_sorted(weights)[:, None]
    return weights / np.where(total > 0, total, 1.0)


@no_type_check
@compiled(nogil=True)
def _track(gold, allowed, prior, switch):
    tokens, sources = gold.shape
    weights = np.zeros((tokens, sources))
    now, part = prior.copy(), np.empty(sources)
    for i in range(tokens):
        best = -np.inf
        for s in range(sources):
            part[s] = now[s] if allowed[i, s] else 0.0
            if allowed[i, s] and now[s] > 0:
                best = max(best, gold[i, s])
        awake = np.sort(part).sum()
        if awake == 0.0:  # only sources that have been ruled out are left; begin again with them
            for s in range(sources):
                part[s] = prior[s] if allowed[i, s] else 0.0
            total = np.sort(part).sum()
            if total > 0.0:
                weights[i] = part / total
            continue
        weights[i] = part / awake
        if best > -np.inf:
            for s in range(sources):
                part[s] = weights[i, s] * np.exp(gold[i, s] - best) if allowed[i, s] else 0.0
            scale = awake / np.sort(part).sum()
            for s in range(sources):
                if allowed[i, s]:
                    now[s] = part[s] * scale
        now = (1.0 - switch) * now + switch * prior
    return weights
