"""The rules that every row of a store keeps, docs/store.md; checked for a row group at a time.

`store verify` and whatever reads a store for the first time ask the same function, `broken`. Nothing here trusts the
numbers it looks at: only the sizes of columns, which `rows.flatten` has compared, are used to walk through them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from fuselm import rounding
from fuselm.compiling import compiled
from fuselm.rows import Columns

STAGES = ("capture", "align", "fuse")
MOST_IDS = 1 << 24  # of a vocabulary, where nothing tells how many it has
MOST_ROUNDED = 0.25  # that rounding moves the sum of a row by; docs/store.md
NORMALISED = 0.35  # nats that dividing a row by its sum, after rounding, moves an entry by, but not the gold
FINGERPRINT = "^([0-9a-f]{16})?$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the manifest of a store says of its rows. Where it names no tokenizer, no stage of fuselm made it: then
    nothing is expected of what golds and weights have to do with the stage.
    """

    stage: str
    vocabulary_size: int
    sources: int | None  # that a fused store has weights of
    is_made: bool  # by a stage
    slack: float  # nats between gold and its entry, beside rounding


def expected(made: Mapping[str, Any], vocabulary_size: int | None = None) -> Expected:
    """Return what rows must agree with. Raises `ValueError` where the manifest is not that of a store."""
    counts, parameters = made["counts"], made["parameters"]
    if made["stage"] not in STAGES:
        raise ValueError(f"the stage is {made['stage']!r:.40}, needs one of {', '.join(STAGES)}")
    for name in ("documents", "tokens", "entries"):
        if type(counts.get(name)) is not int or counts[name] < 0:
            raise ValueError(f"counts.{name} is {counts.get(name)!r:.40}, needs a whole number")
    for name in ("skipped", "sources"):
        given = counts.get(name, [])
        if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
            raise ValueError(f"counts.{name} is no list of names")
    said = [of["vocabulary_size"] for of in (counts, parameters) if "vocabulary_size" in of]
    if any(type(size) is not int or size < 1 for size in said):
        raise ValueError(f"vocabulary_size is {said[0]!r:.40}, needs a whole number above 0")
    cut_off = parameters.get("tail", 0.0)
    cut_off = min(max(cut_off, 0.0), 1.0) if isinstance(cut_off, int | float) and "layout" in parameters else 0.0
    exact = made["stage"] == "capture" and "layout" not in parameters
    return Expected(
        stage=made["stage"],
        vocabulary_size=min([MOST_IDS, *said, *([] if vocabulary_size is None else [vocabulary_size])]),
        sources=len(counts["sources"]) if made["stage"] == "fuse" and "sources" in counts else None,
        is_made="tokenizer" in made["inputs"],
        slack=0.02 if exact else NORMALISED - (math.log1p(-cut_off) if cut_off < 1 else -math.inf),
    )


def broken(columns: Columns, rows: Expected) -> dict[int, str]:
    """Return the documents of a row group, by number, that break a rule, with the first one that each breaks."""
    found: dict[int, str] = {}
    with np.errstate(all="ignore"):
        group = _Group(columns, rows)
        for rule, broken_at in RULES.items():
            flags, edges = broken_at(group)
            if not flags.any():
                continue
            places = np.flatnonzero(flags)
            documents = places if edges is None else np.searchsorted(edges, places, side="right") - 1
            for document in np.unique(documents).tolist():
                found.setdefault(document, rule)
    return found


class _Group:
    """The columns of a row group, and what several rules look at."""

    def __init__(self, columns: Columns, rows: Expected):
        self.columns, self.rows, flat = columns, rows, columns.flat
        self.edges = columns.edges["tokens"]
        self.documents = len(self.edges) - 1
        self.gold, self.tail, self.starts = (flat[name] for name in ("gold", "tail", "starts"))
        self.informed = flat["counts"] > 0
        masses = np.exp(flat["logprobs"])
        self.own = np.empty(len(self.tail), np.float32)  # log-probability of the gold entry; NaN: none, 1: drawn
        self.flags = _scan(
            columns.offsets,
            flat["tokens"],
            flat["ids"],
            flat["logprobs"],
            masses,
            self.tail,
            rows.vocabulary_size,
            self.own,
        )

    def entries(self, bit: int) -> tuple[Bool[ndarray, "tokens"], Int[ndarray, "_"]]:
        return (self.flags & bit) > 0, self.edges

    def sums(self, values: ndarray) -> Float[ndarray, "documents"]:
        """Add up a value of each token by document."""
        if not self.documents:
            return np.zeros(0)
        sums = np.add.reduceat(np.append(values, 0.0), self.edges[:-1])
        return np.where(np.diff(self.edges) > 0, sums, 0.0)


BELOW, BEYOND, UNSORTED, POSITIVE, TAIL, DRAWN, SUM = (1 << n for n in range(7))


@compiled(nogil=True)
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _scan(offsets, tokens, ids, logprobs, masses, tail, size, own):
    """Return the rules that the entries of each row break, as bits, and find each row's gold entry."""
    flags = np.zeros(len(tail), np.uint8)
    for row in range(len(tail)):
        found, before, drawn, total = 0, -(1 << 40), False, np.float64(tail[row])
        token, own_logprob = tokens[row], np.float32(np.nan)
        for e in range(offsets[row], offsets[row + 1]):
            entry, logprob = ids[e], logprobs[e]
            if entry <= before:
                found |= UNSORTED
            if entry < 0:
                found |= BELOW
            if entry >= size:
                found |= BEYOND
            if not logprob <= 0.0:
                found |= POSITIVE
            if logprob == -np.inf:
                drawn = True
            if entry == token:
                own_logprob = logprob if logprob > -np.inf else np.float32(1.0)
            before = entry
            total += masses[e]
        if not (tail[row] >= 0.0 and tail[row] <= 1.0):
            found |= TAIL
        if drawn and not tail[row] > 0.0:
            found |= DRAWN
        if not abs(total - 1.0) <= MOST_ROUNDED:
            found |= SUM
        flags[row], own[row] = found, own_logprob
    return flags


def _golds_astray(group: _Group) -> Bool[ndarray, "tokens"]:
    """Flag the golds that are not what their entries say or, without one, are more than the tail holds."""
    gold, own = group.gold, group.own
    if not group.rows.is_made or group.rows.stage == "fuse":
        return np.zeros(len(gold), bool)
    step = np.minimum(2 / (2 * rounding.ROOTS) * np.exp(-own / 2), 1 / (2 * rounding.QUARTERS))
    astray = np.abs(gold - own) > step + 1 / (2 * rounding.GOLD_STEPS) + group.rows.slack
    most = 1.4 * (np.sqrt(group.tail) + 2 / rounding.TAIL_ROOTS) ** 2 + 0.06
    without = np.isnan(own) & group.informed
    return (astray & (own <= 0)) | (without & (np.exp(gold) > most))


def _nats_astray(group: _Group) -> Bool[ndarray, "documents"]:
    """Flag the documents whose cross-entropy is not the sum of their golds; rows without entries count as guesses."""
    nats = group.columns.flat["nats"]
    if not group.rows.is_made or group.rows.stage != "capture":
        return ~(nats >= 0)
    more = nats + group.sums(np.where(group.informed, group.gold, 0.0).astype(np.float64))
    tokens = np.diff(group.edges)
    guessed = group.sums((~group.informed).astype(np.float64)) * math.log(group.rows.vocabulary_size)
    rounded = tokens / (2 * rounding.GOLD_STEPS) + 1e-4 + 1e-5 * np.abs(nats)
    both = np.isposinf(nats) & (group.sums(np.isneginf(group.gold).astype(np.float64)) > 0)
    near = np.isfinite(nats) & (more >= -rounded) & (more <= guessed + rounded)
    return ~(nats >= 0) | ~(both | near)


def _starts_astray(group: _Group) -> Bool[ndarray, "documents"]:
    starts, edges, size = group.starts, group.edges, group.columns.flat["bytes"]
    has_tokens = np.diff(edges) > 0
    falls = np.append(False, starts[1:] < starts[:-1])[: len(starts)]
    falls[edges[:-1][has_tokens]] = False
    wrong = (size < 0) | (group.sums(falls.astype(np.float64)) > 0)
    first, last = starts[edges[:-1][has_tokens]], starts[edges[1:][has_tokens] - 1]
    wrong[has_tokens] |= (first < -1) | (first > 0) | (last > size[has_tokens])
    return wrong


def _weights_astray(group: _Group) -> Bool[ndarray, "documents"]:
    """Flag weights where there are none, a number of columns that is not that of the sources, and what is no share."""
    weights, edges = group.columns.flat["weights"], group.columns.edges["weights"]
    tokens, sources = np.diff(group.edges), group.rows.sources
    wrong = np.zeros(len(tokens), bool)
    if not np.isfinite(weights).all():
        wrong[np.searchsorted(edges, np.flatnonzero(~np.isfinite(weights)), side="right") - 1] = True
    if group.rows.stage != "fuse":
        return wrong | (group.rows.is_made & (np.diff(edges) > 0))
    if sources is None:
        return wrong
    wrong |= np.diff(edges) != tokens * sources
    if sources and not wrong.any():
        shares = weights.reshape(-1, sources)
        sums = shares.sum(axis=1)
        rounded = sources / (2 * rounding.WEIGHT_STEPS) + 1e-3
        is_share = (shares.min(axis=1) >= 0) & ((np.abs(sums - 1) <= rounded) | (sums == 0))
        wrong |= group.sums((~is_share).astype(np.float64)) > 0
    return wrong


def _tokens(flag: Callable[[_Group], ndarray]) -> Callable[[_Group], tuple[ndarray, ndarray]]:
    return lambda group: (flag(group), group.edges)


def _documents(flag: Callable[[_Group], ndarray]) -> Callable[[_Group], tuple[ndarray, None]]:
    return lambda group: (flag(group), None)


# A flag of each token, with the edges of documents, or of each document.
RULES: dict[str, Callable[[_Group], tuple[ndarray, Int[ndarray, "_"] | None]]] = {
    "an id is below 0": lambda group: group.entries(BELOW),
    "an id is outside the vocabulary": lambda group: group.entries(BEYOND),
    "ids are not ascending, each once in a row": lambda group: group.entries(UNSORTED),
    "a log-probability is above 0": _tokens(
        lambda group: ((group.flags & POSITIVE) > 0) | ~(group.gold <= 0),
    ),
    "a tail is no probability": lambda group: group.entries(TAIL),
    "an entry was drawn from a tail of 0": lambda group: group.entries(DRAWN),
    "entries and tail do not sum to 1": lambda group: group.entries(SUM),
    "a row without entries has a tail other than 1, or gold": _tokens(
        lambda g: ~g.informed & ((g.tail != 1) | ((g.gold != 0) & ((g.rows.stage == "capture") | ~np.isneginf(g.gold))))
    ),
    "gold is not what its entry or the tail says": _tokens(_golds_astray),
    "a token is below 0": _tokens(lambda group: group.columns.flat["tokens"] < 0),
    "a token is outside the vocabulary": _tokens(
        lambda group: group.columns.flat["tokens"] >= group.rows.vocabulary_size
    ),
    "tokens begin outside the text, or not in order": _documents(_starts_astray),
    "the cross-entropy is not that of its golds": _documents(_nats_astray),
    "weights do not fit the stage, its sources or the tokens": _documents(_weights_astray),
    "the text's fingerprint is none": _documents(
        lambda group: ~pc.match_substring_regex(group.columns.texts, FINGERPRINT).to_numpy(zero_copy_only=False)
    ),
}
