"""Which entries of a distribution are kept. The rest is the row's tail, known and never dropped; docs/store.md.

A policy sees the logits of some rows, a chunk at a time, or rows of a store that were kept by a wider one. For a given
number of entries in all, `threshold` loses the least in square: it keeps what is large wherever that is, few entries of
a row that is sure and many of one that is not. `sampled` keeps so the head, and draws from the tail.
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
    """Say what to keep. Each policy uses the numbers that `policies.POLICIES` names for it."""

    policy: str
    top_k: int = 1 << 30  # entries of a row, at most
    mass: float = 1.0  # nucleus
    threshold: float = 0.0  # probability
    draws: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Rows of entries, one row after the other, and the mass of all others."""

    counts: Int[ndarray, "rows"]
    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]  # -inf of an entry that was drawn from the others
    tail: Float[ndarray, "rows"]


def keep(
    policy: Policy,
    logits: Float[Tensor, "rows vocab"],
    found: Survey,
    *,
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
) -> Kept:
    """The entries that `policy` keeps of these rows, of which `forward.survey` found so much; `gold` are the ids that
    came. `uniform` (`uniforms`) is all the chance there is: a document's draws don't depend on what it is read with.
    """
    if policy.policy == "sampled":
        return _sampled(policy, logits, found, gold, uniform)
    if policy.policy == "threshold" and scan.readable(logits):
        return _above(policy, logits, found)
    return _largest(policy, logits, found)


def uniforms(document: str, count: int) -> Float[ndarray, "count"]:
    """In [0, 1), one a token, the same for a document on every machine."""
    seed = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).random(count)


def reduce(policy: Policy, distributions: Distributions, *, draws: int | None = None) -> Distributions:
    """What `policy` keeps of rows that are kept already, the most probable first; `draws`, if they were `sampled`.

    Raises `ValueError` where that isn't what it would have kept of the full distribution, or can't be told.
    """
    if policy.policy == "sampled":
        raise ValueError("sampled: cannot be drawn from kept entries, it needs whole distributions; capture again")
    d, bound = distributions, 1.0
    if draws is not None:  # without the gold entry, which may be less probable than what is not there
        d, bound = shorten(Policy(policy="threshold", threshold=HEAD / draws), d), np.nextafter(1 / draws, 0)
    cut = shorten(policy, d)
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


def shorten(policy: Policy, distributions: Distributions) -> Distributions:
    """The entries that `policy` wants of those that are there, the most probable first; at least one of a row."""
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


def _largest(policy: Policy, logits: Float[Tensor, "rows vocab"], found: Survey) -> Kept:
    """The most probable entries, as long as they are wanted; at least one."""
    values, ids = forward.top_k(logits, found.maxima, min(policy.top_k, logits.shape[1]))
    logprobs = (values.float() - found.log_z[:, None]).clamp(max=0).double().cpu().numpy()
    probs = np.exp(logprobs)
    kept = WANTED[policy.policy](policy, probs, np.cumsum(probs, axis=1) - probs)
    kept[:, 0] = True
    return Kept(
        counts=kept.sum(axis=1),
        ids=ids.int().cpu().numpy()[kept],
        logprobs=logprobs[kept].astype(np.float32),
        tail=np.clip(1.0 - (probs * kept).sum(axis=1), 0.0, 1.0).astype(np.float32),
    )


def _above(policy: Policy, logits: Float[Tensor, "rows vocab"], found: Survey) -> Kept:
    """`_largest` for a threshold, without looking for more entries than it wants."""
    bound = torch.minimum(found.log_z + math.log(policy.threshold) - SLACK, found.maxima.amax(dim=1))
    counts, ids, values = scan.above(logits, found.maxima, bound)
    rows = np.repeat(np.arange(len(counts)), counts)
    logprobs = np.minimum(values - found.log_z.numpy()[rows], 0).astype(np.float64)
    order = np.lexsort((-logprobs, rows))
    ids, logprobs, probs = ids[order], logprobs[order], np.exp(logprobs[order])
    rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = (rank == 0) | (rank < policy.top_k) & _threshold(policy, probs, probs)
    return Kept(
        counts=np.bincount(rows[kept], minlength=len(counts)),
        ids=ids[kept],
        logprobs=logprobs[kept].astype(np.float32),
        tail=np.clip(1.0 - np.bincount(rows[kept], probs[kept], len(counts)), 0.0, 1.0).astype(np.float32),
    )


def _sampled(
    policy: Policy,
    logits: Float[Tensor, "rows vocab"],
    found: Survey,
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
) -> Kept:
    """The head as it is, every entry of at least 1/N and the one that came, and systematic draws from the tail, one for
    each whole 1/N of it.

    Random Sampling Knowledge Distillation (Anshumann et al. 2025, arXiv 2503.16870) draws all of a row; an entry that
    would be drawn each time is better kept (Cohen et al. 2009, VarOpt). The tail is cut into equal parts, and each
    gives the token at the same place in it: a token is drawn as often as its share of the tail says, at most once. So
    head and draws, with the tail's mass shared evenly among these, are an unbiased picture of the row.
    """
    if scan.readable(logits):
        counts, ids, logprobs, tail = scan.draw(logits, found, gold, uniform, policy.draws)
        return Kept(counts=counts, ids=ids, logprobs=logprobs, tail=tail)
    parts = [
        _drawn(logits[rows].float(), found.log_z[rows], gold[rows], uniform[rows], policy.draws)
        for rows in forward.chunks(len(logits), logits.shape[1], SAMPLED_AT_ONCE)
    ]
    counts, ids, logprobs, tail = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Kept(counts=counts, ids=ids, logprobs=logprobs, tail=tail)


def _drawn(
    logits: Float[Tensor, "rows vocab"],
    log_z: Float[Tensor, "rows"],
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
    draws: int,
) -> tuple[Int[ndarray, "rows"], Int[ndarray, "entries"], Float[ndarray, "entries"], Float[ndarray, "rows"]]:
    """`scan.draw` where the logits are on another device."""
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


def _all(policy: Policy, probs: Float[ndarray, "..."], before: Float[ndarray, "..."]) -> Bool[ndarray, "..."]:
    return np.ones(probs.shape, bool)


def _nucleus(policy: Policy, probs: Float[ndarray, "..."], before: Float[ndarray, "..."]) -> Bool[ndarray, "..."]:
    return before < policy.mass


def _threshold(policy: Policy, probs: Float[ndarray, "..."], before: Float[ndarray, "..."]) -> Bool[ndarray, "..."]:
    return probs >= policy.threshold


# Whether an entry is wanted, by its probability and that of all more probable ones.
WANTED: dict[str, Callable[..., Bool[ndarray, "..."]]] = {
    "top_k": _all,
    "nucleus": _nucleus,
    "threshold": _threshold,
}
