"""Decide which entries of a distribution are kept; all others are summed up in the row's tail (docs/store.md).

A policy sees a chunk of rows of logits, or rows of a store that a wider policy kept. For a given total of entries,
`threshold` loses the least in squared error: it keeps large probabilities wherever they are, so few entries of a
confident row and many of an uncertain one. `sampled` keeps the head in the same way, and draws entries from the tail.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from fuselm.models import forward, scan
from fuselm.models.scan import Survey
from fuselm.stores.distributions import Distributions

SLACK = 1e-3  # nats below the threshold, within which rounding decides
HEAD = 0.9  # of 1/draws: what is above belongs to the head, however it is rounded
SAMPLED_AT_ONCE = 1 << 21  # logits whose running sums, in float64, are held


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Say which entries to keep. Each policy uses the numbers that `policies.POLICIES` lists for it."""

    policy: str
    top_k: int = 1 << 30  # entries of a row, at most
    mass: float = 1.0  # nucleus
    threshold: float = 0.0  # probability
    draws: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedEntries:
    """Hold the entries kept of some rows, one row after the other, and the probability of all others."""

    counts: Int[ndarray, "rows"]
    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]  # natural logs; -inf for an entry that was drawn from the tail
    tail: Float[ndarray, "rows"]


def retain_entries(
    policy: Policy,
    logits: Float[Tensor, "rows vocab"],
    found: Survey,
    *,
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
) -> RetainedEntries:
    """Return the entries that `policy` keeps of these rows of logits.

    `found` is what `forward.survey_logits` found in the rows; `gold` holds the ids that really came. `uniform` (see
    `draw_uniforms`) is the only source of chance, so that a document's draws do not depend on the documents beside it.
    """
    if policy.policy == "sampled":
        return _retain_head_and_draws(policy, logits, found, gold, uniform)
    if policy.policy == "threshold" and scan.can_read(logits):
        return _retain_above_threshold(policy, logits, found)
    return _retain_most_probable(policy, logits, found)


def draw_uniforms(document: str, count: int) -> Float[ndarray, "count"]:
    """Draw one number from [0, 1) per token; a document gets the same numbers on every machine."""
    seed = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).random(count)


def narrow_rows(policy: Policy, distributions: Distributions, *, draws: int | None = None) -> Distributions:
    """Cut rows that were kept by a wider policy to what `policy` keeps, the most probable entries first.

    `draws` is the number of draws if the rows were kept by `sampled`, else None.

    Raises `ValueError` if the result would, or might, differ from what `policy` keeps of the full distributions.
    """
    if policy.policy == "sampled":
        raise ValueError("sampled: cannot be drawn from kept entries, it needs whole distributions; capture again")
    d, bound = distributions, 1.0
    if draws is not None:  # without the gold entry, which may be less probable than what is not there
        d, bound = (
            drop_unwanted_entries(Policy(policy="threshold", threshold=HEAD / draws), d),
            np.nextafter(1 / draws, 0),
        )
    cut = drop_unwanted_entries(policy, d)
    # A row of which all entries are kept would have had more, if the tail can hold one that is wanted.
    probs = np.exp(d.logprobs.astype(np.float64))
    last = np.append(probs, 0.0)[np.maximum(d.offsets[1:] - 1, 0)]
    largest = np.minimum(np.minimum(d.tail.astype(np.float64), last), bound)
    sums = np.bincount(d.rows, weights=probs, minlength=len(d)).astype(np.float64)
    more = (cut.counts == d.counts) & (d.counts < policy.top_k) & d.informed & (largest > 1e-6)
    more &= WANTED[policy.policy](policy, largest, sums)
    if more.any():
        row = int(more.argmax())
        raise ValueError(
            f"{policy.policy}: row {row} has {d.counts[row]} entries and a tail of {d.tail[row]:.4f}, fewer than the "
            "policy would keep; choose a narrower one, or capture again"
        )
    return cut


def drop_unwanted_entries(policy: Policy, distributions: Distributions) -> Distributions:
    """Keep the entries that `policy` wants, at least one in a row; rows must have the most probable entry first."""
    d = distributions
    rank = np.arange(len(d.ids)) - np.repeat(d.offsets[:-1], d.counts)
    probs = np.exp(d.logprobs.astype(np.float64))
    before = np.cumsum(probs) - probs
    before -= np.repeat(before[d.offsets[:-1][d.informed]], d.counts[d.informed])
    kept = (rank < policy.top_k) & WANTED[policy.policy](policy, probs, before)
    kept |= rank == 0
    counts = np.bincount(d.rows[kept], minlength=len(d))
    dropped = np.bincount(d.rows[~kept], weights=probs[~kept], minlength=len(d))
    return Distributions(
        offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
        ids=d.ids[kept],
        logprobs=d.logprobs[kept],
        gold=d.gold,
        tail=np.clip(d.tail + dropped, 0.0, 1.0).astype(np.float32),
    )


def _retain_most_probable(policy: Policy, logits: Float[Tensor, "rows vocab"], found: Survey) -> RetainedEntries:
    """Keep the most probable entries for as long as the policy wants them, at least one in a row."""
    values, ids = forward.find_top_k(logits, found.maxima, min(policy.top_k, logits.shape[1]))
    logprobs = (values.float() - found.log_z[:, None]).clamp(max=0).double().cpu().numpy()
    probs = np.exp(logprobs)
    kept = WANTED[policy.policy](policy, probs, np.cumsum(probs, axis=1) - probs)
    kept[:, 0] = True
    return RetainedEntries(
        counts=kept.sum(axis=1),
        ids=ids.int().cpu().numpy()[kept],
        logprobs=logprobs[kept].astype(np.float32),
        tail=np.clip(1.0 - (probs * kept).sum(axis=1), 0.0, 1.0).astype(np.float32),
    )


def _retain_above_threshold(policy: Policy, logits: Float[Tensor, "rows vocab"], found: Survey) -> RetainedEntries:
    """Do the same as `_retain_most_probable` for a threshold, without sorting more entries than it wants."""
    bound = torch.minimum(found.log_z + math.log(policy.threshold) - SLACK, found.maxima.amax(dim=1))
    counts, ids, values = scan.find_above(logits, found.maxima, bound)
    rows = np.repeat(np.arange(len(counts)), counts)
    logprobs = np.minimum(values - found.log_z.numpy()[rows], 0).astype(np.float64)
    order = np.lexsort((-logprobs, rows))
    ids, logprobs, probs = ids[order], logprobs[order], np.exp(logprobs[order])
    rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = (rank == 0) | (rank < policy.top_k) & _want_above_threshold(policy, probs, probs)
    return RetainedEntries(
        counts=np.bincount(rows[kept], minlength=len(counts)),
        ids=ids[kept],
        logprobs=logprobs[kept].astype(np.float32),
        tail=np.clip(1.0 - np.bincount(rows[kept], probs[kept], len(counts)), 0.0, 1.0).astype(np.float32),
    )


def _retain_head_and_draws(
    policy: Policy,
    logits: Float[Tensor, "rows vocab"],
    found: Survey,
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
) -> RetainedEntries:
    """Keep the head of each row as it is, and draw systematically from its tail, once for each whole 1/N of it.

    The head is every entry of at least 1/N, the most probable one, and the token that really came.

    Random Sampling Knowledge Distillation (Anshumann et al. 2025, arXiv 2503.16870) draws all of a row; an entry that
    would be drawn each time is better kept (Cohen et al. 2009, VarOpt). The tail is cut into equal parts, and each part
    gives the token at the same place in it: a token is drawn as often as its share of the tail says, at most once. So
    head and draws, with the tail's mass shared evenly among the draws, are an unbiased estimate of the row.
    """
    if scan.can_read(logits):
        counts, ids, logprobs, tail = scan.draw_entries(logits, found, gold, uniform, policy.draws)
        return RetainedEntries(counts=counts, ids=ids, logprobs=logprobs, tail=tail)
    parts = [
        _draw_with_torch(logits[rows].float(), found.log_z[rows], gold[rows], uniform[rows], policy.draws)
        for rows in forward.slice_rows(len(logits), logits.shape[1], SAMPLED_AT_ONCE)
    ]
    counts, ids, logprobs, tail = (np.concatenate(column) for column in zip(*parts, strict=True))
    return RetainedEntries(counts=counts, ids=ids, logprobs=logprobs, tail=tail)


def _draw_with_torch(
    logits: Float[Tensor, "rows vocab"],
    log_z: Float[Tensor, "rows"],
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
    draws: int,
) -> tuple[Int[ndarray, "rows"], Int[ndarray, "entries"], Float[ndarray, "entries"], Float[ndarray, "rows"]]:
    """Do the same as `scan.draw_entries` for logits on another device."""
    rows, vocab = logits.shape
    logprobs = logits - log_z[:, None]
    head = logprobs >= -math.log(draws)
    for ids in (logits.argmax(dim=1), gold):
        head[torch.arange(rows, device=logits.device), ids] = True
    sums = logprobs.double().exp().masked_fill_(head, 0).cumsum(dim=1)
    tail = sums[:, -1].clamp(max=1)
    times = (tail * draws).floor()
    times = torch.where((times == 0) & (tail * draws >= scan.SLIVER), 1, times)
    places = torch.as_tensor(uniform, device=logits.device)[:, None] + torch.arange(draws, device=logits.device)
    drawn = torch.searchsorted(sums, places / times[:, None] * sums[:, -1:], right=True).clamp_(max=vocab - 1)
    keys = drawn + torch.arange(rows, device=logits.device)[:, None] * vocab
    keys = keys[torch.arange(draws, device=logits.device) < times[:, None]]
    kept = head.flatten().index_fill(0, keys, True).view_as(head)
    at, ids = kept.nonzero(as_tuple=True)
    values = torch.where(head[at, ids], logprobs[at, ids].clamp(max=0), -math.inf)
    counts = torch.bincount(at, minlength=rows)
    return counts.cpu().numpy(), ids.int().cpu().numpy(), values.cpu().numpy(), tail.float().cpu().numpy()


def _want_all(policy: Policy, probs: Float[ndarray, "..."], before: Float[ndarray, "..."]) -> Bool[ndarray, "..."]:
    return np.ones(probs.shape, bool)


def _want_nucleus(policy: Policy, probs: Float[ndarray, "..."], before: Float[ndarray, "..."]) -> Bool[ndarray, "..."]:
    return before < policy.mass


def _want_above_threshold(
    policy: Policy, probs: Float[ndarray, "..."], before: Float[ndarray, "..."]
) -> Bool[ndarray, "..."]:
    return probs >= policy.threshold


# Say whether an entry is wanted, by its probability and the sum of all more probable ones.
WANTED: dict[str, Callable[..., Bool[ndarray, "..."]]] = {
    "top_k": _want_all,
    "nucleus": _want_nucleus,
    "threshold": _want_above_threshold,
}
