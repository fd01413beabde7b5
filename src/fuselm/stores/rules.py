"""Check the rules that every row of a store keeps (docs/store.md), one row group at a time.

`store verify`, and whatever reads a store for the first time, call the same function, `find_broken_rules`. It trusts
none of the numbers it looks at: only the sizes of columns, which `rows.flatten_columns` has compared, are used to walk
through them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool
from numpy import ndarray

from fuselm.stores import rounding
from fuselm.stores.rows import FlatColumns
from fuselm.system.compiling import compiled

STAGES = ("capture", "align", "fuse")
MOST_IDS = 1 << 24  # in a vocabulary, if nothing tells how many it has
MOST_ROUNDED = 0.25  # by which rounding may move the sum of a row; docs/store.md
NORMALISED = 0.35  # nats that dividing a row by its sum, after rounding, moves an entry by, but not the gold
SERVED, DERIVED = 0.002, 0.06  # of a probability: what servers round, what approximations of others' make of nothing
FINGERPRINT = "^([0-9a-f]{16})?$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """State what the manifest of a store implies for its rows.

    If the manifest names no tokenizer, no stage of fuselm made the store; then golds and weights are not held to the
    stage. Rows that treat all branches alike are made apart from their golds, so neither says what the other is.
    """

    stage: str
    vocabulary_size: int
    sources: int | None  # number of sources that a fused store has weights for
    is_made: bool  # whether a stage of fuselm made it
    has_golds_of_rows: bool  # whether each gold is what its row says
    slack: float  # nats allowed between gold and its entry, besides rounding
    noise: float  # probability by which a gold token that is no entry may exceed its tail


def read_expectations(made: Mapping[str, Any], vocabulary_size: int | None = None) -> Expectations:
    """Return what rows must agree with. Raises `ValueError` if the manifest is not that of a store."""
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
    _check_facts(made)
    sizes = [facts["vocabulary_size"] for facts in (counts, parameters) if "vocabulary_size" in facts]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"vocabulary_size is {sizes[0]!r:.40}, needs a whole number above 0")
    cut_off, layout = 0.0, parameters.get("layout")
    if layout is not None:
        cut_off = parameters.get("tail", 0.0)
        if type(cut_off) not in (int, float) or not 0 <= cut_off < 1:
            raise ValueError(f"parameters.tail is {cut_off!r:.40}, needs a share below 1")
    exact = made["stage"] == "capture" and layout is None
    return Expectations(
        stage=made["stage"],
        vocabulary_size=min([MOST_IDS, *sizes, *([] if vocabulary_size is None else [vocabulary_size])]),
        sources=len(counts["sources"]) if made["stage"] == "fuse" and "sources" in counts else None,
        is_made="tokenizer" in made["inputs"],
        has_golds_of_rows=made["stage"] != "fuse" and parameters.get("method") != "branches",
        slack=0.02 if exact else NORMALISED - math.log1p(-cut_off),
        noise=SERVED if exact else DERIVED,
    )


def _check_facts(made: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a fact about the model is no text, or an option of a policy is no valid number."""
    for name, value in made["about"].items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"about.{name} is {value!r:.40}, needs a text")
    is_capture = made["stage"] == "capture"
    for name in ("draws", "top_k", "mass", "threshold"):
        value = made["parameters"].get(name)
        if value is None or (name == "draws" and isinstance(value, bool) and not is_capture):  # whether there are any
            continue
        if name in ("draws", "top_k") and (type(value) is not int or value < 1):
            raise ValueError(f"parameters.{name} is {value!r:.40}, needs a whole number above 0")
        if is_capture and (type(value) not in (int, float) or not value >= 0):
            raise ValueError(f"parameters.{name} is {value!r:.40}, needs a number of at least 0")


# Give each rule a bit; a document that breaks several is reported with the first.
RULES = {
    1 << n: rule
    for n, rule in enumerate(
        (
            "an id is below 0",
            "an id is outside the vocabulary",
            "ids are not ascending, each once in a row",
            "a log-probability is above 0",
            "a tail is no probability",
            "an entry was drawn from a tail of 0",
            "entries and tail do not sum to 1",
            "a row without entries has a tail other than 1, or gold",
            "a token is below 0",
            "a token is outside the vocabulary",
            "gold is not what its entry or the tail says",
            "tokens begin outside the text, or not in order",
            "the cross-entropy is not that of its golds",
            "weights do not fit the stage, its sources or the tokens",
            "the text's fingerprint is none",
        )
    )
}
BELOW, BEYOND, UNSORTED, POSITIVE, TAIL, DRAWN, SUM, EMPTY, TOKEN, FOREIGN, GOLD, STARTS, NATS, WEIGHTS, TEXT = RULES


def find_broken_rules(columns: FlatColumns, rows: Expectations) -> dict[int, str]:
    """Return the numbers of the documents in a row group that break a rule, with the first rule that each breaks."""
    flat, edges = columns.flat, columns.edges["tokens"]
    with np.errstate(over="ignore"):
        masses = np.exp(flat["logprobs"])  # numpy takes many at a time
    flags = _scan(
        edges.astype(np.int64),
        columns.offsets,
        *(flat[name] for name in ("tokens", "starts", "gold", "tail", "ids", "logprobs")),
        masses,
        *(flat[name] for name in ("bytes", "nats")),
        rows.vocabulary_size,
        rows.stage == "capture",
        rows.is_made and rows.has_golds_of_rows,
        rows.is_made and rows.stage == "capture",
        rows.slack,
        rows.noise,
    )
    flags |= np.where(_flag_wrong_weights(columns, rows), WEIGHTS, 0)
    known = pc.match_substring_regex(columns.texts, FINGERPRINT).to_numpy(zero_copy_only=False)
    flags |= np.where(known, 0, TEXT)
    if not flags.any():
        return {}
    return {n: RULES[int(flags[n] & -flags[n])] for n in np.flatnonzero(flags).tolist()}


STEP = 1 / rounding.ROOTS  # of a root, half of it twice: from a root to its logarithm
LARGEST_STEP = 1 / (2 * rounding.QUARTERS)
GOLD_STEP = 1 / (2 * rounding.GOLD_STEPS)
TAIL_STEP = 2 / rounding.TAIL_ROOTS


@compiled(nogil=True, fastmath={"reassoc"})  # sums in any order; NaN stays NaN
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _scan(  # noqa: C901
    edges,
    offsets,
    tokens,
    starts,
    gold,
    tail,
    ids,
    logprobs,
    masses,
    sizes,
    nats,
    vocabulary,
    is_capture,
    knows_golds,
    knows_nats,
    slack,
    noise,
):
    """Return the rules that each document breaks, as bits. `flatten_columns` has compared the columns' lengths."""
    flags = np.zeros(len(sizes), np.int64)
    log_noise, stretched = np.log(noise), 1.02 if noise == SERVED else 1.4  # by rounding, and by normalising
    for document in range(len(sizes)):
        found, golds, guesses, before_start = 0, 0.0, 0, np.int64(-1)
        for row in range(edges[document], edges[document + 1]):
            begin, end, token = offsets[row], offsets[row + 1], tokens[row]
            before, unsorted, negative, drawn = np.int64(-1) << 40, False, True, False
            total, own = np.float64(tail[row]), np.float64(np.nan)  # the gold entry's log-probability; NaN: none
            for e in range(begin, end):
                entry, logprob = ids[e], logprobs[e]
                unsorted |= entry <= before
                negative &= logprob <= 0.0
                drawn |= logprob == -np.inf
                total += masses[e]
                if entry == token:
                    own = logprob
                before = entry
            if unsorted:
                found |= UNSORTED
            if begin < end and ids[begin] < 0:
                found |= BELOW
            if begin < end and ids[end - 1] >= vocabulary:
                found |= BEYOND
            if not (negative and gold[row] <= 0.0):
                found |= POSITIVE
            if not (tail[row] >= 0.0 and tail[row] <= 1.0):
                found |= TAIL
            if drawn and not tail[row] > 0.0:
                found |= DRAWN
            if not abs(total - 1.0) <= MOST_ROUNDED:
                found |= SUM
            if token < 0:
                found |= TOKEN
            if token >= vocabulary:
                found |= FOREIGN
            if starts[row] < before_start:
                found |= STARTS
            before_start = starts[row]
            if begin == end:
                guesses += 1
                if tail[row] != 1.0 or (gold[row] != 0.0 and (is_capture or gold[row] != -np.inf)):
                    found |= EMPTY
                continue
            golds += gold[row]
            if not knows_golds:
                continue
            if drawn and not own > -np.inf:  # the token that came is in the head: it is never drawn
                found |= GOLD
            elif own <= 0.0:
                apart = abs(gold[row] - own) - GOLD_STEP - slack
                if not apart <= STEP and not apart <= min(STEP * np.exp(-own / 2), LARGEST_STEP):
                    found |= GOLD
            elif gold[row] > log_noise:
                most = stretched * (np.sqrt(tail[row]) + TAIL_STEP) ** 2 + noise
                if np.exp(gold[row]) > most:
                    found |= GOLD
        first, last = edges[document], edges[document + 1] - 1
        if sizes[document] < 0 or (first <= last and (starts[first] > 0 or starts[last] > sizes[document])):
            found |= STARTS
        said = nats[document]
        if not said >= 0.0 or (knows_nats and (said == np.inf) != (golds == -np.inf)):
            found |= NATS
        elif knows_nats and said < np.inf:
            more, rounded = said + golds, (last + 1 - first) * GOLD_STEP + 1e-4 + 1e-5 * said
            if not (more >= -rounded and more <= guesses * np.log(vocabulary) + rounded):
                found |= NATS
        flags[document] = found
    return flags


def _flag_wrong_weights(columns: FlatColumns, rows: Expectations) -> Bool[ndarray, "documents"]:
    """Flag documents whose weights should not be there, have the wrong number of columns, or are not shares."""
    weights, edges = columns.flat["weights"], columns.edges["weights"]
    tokens, sources = np.diff(columns.edges["tokens"]), rows.sources
    wrong = np.zeros(len(tokens), bool)
    if len(weights) and not np.isfinite(weights).all():
        wrong[np.searchsorted(edges, np.flatnonzero(~np.isfinite(weights)), side="right") - 1] = True
    if rows.stage != "fuse":
        return wrong | (rows.is_made & (np.diff(edges) > 0))
    if sources is None:
        return wrong
    wrong |= np.diff(edges) != tokens * sources
    if sources and not wrong.any():
        shares = weights.reshape(-1, sources)
        sums = shares.sum(axis=1)
        rounded = sources / (2 * rounding.WEIGHT_STEPS) + 1e-3
        is_share = (shares.min(axis=1, initial=0) >= 0) & ((np.abs(sums - 1) <= rounded) | (sums == 0))
        owner = np.searchsorted(columns.edges["tokens"], np.flatnonzero(~is_share), side="right") - 1
        wrong[owner] = True
    return wrong
