"""Make traces from rows that others kept; derive what the rows do not tell, and count it.

The tail is what a row's entries leave of 1. A token that came and is not among its row's entries gets an even share of
the tail. A token without a row has none in the trace, and counts in the document's cross-entropy as a guess among all
ids. Mass that was cut off before rows were renormalised can't be derived: the user has to state it.
"""

import math
from collections import Counter
from typing import Any

import numpy as np

from fuselm.models.segmentation import Segmentation
from fuselm.sources.interchange import foreign
from fuselm.sources.interchange.foreign import ForeignRecord, LayoutTokenizer
from fuselm.stores import store
from fuselm.stores.distributions import Distributions, check_distributions
from fuselm.stores.store import Trace

RENORMALISED = 0.99  # if a larger share of the rows sum to 1, they were renormalised
SMALLEST_TAIL = 2.0**-16  # a softmax leaves some mass to every id
LARGEST_SUM = 1.05  # approximated rows may sum to a little more than 1


def derive_trace(
    found: ForeignRecord, tokens: LayoutTokenizer, *, ahead: bool, tail: float | None, counted: Counter[str]
) -> tuple[Trace, str | None]:
    """Return a document's rows in our places, and its text, without special tokens around it and their rows."""
    rows, gold = _place_rows(found, ahead)
    begin, end = 0, len(found.tokens)
    if end and found.tokens[0] == tokens.context:
        begin = 1
    spelled = tokens.vocabulary.token_bytes
    require_numbers(found, tokens.vocabulary.size)
    while end > begin and spelled[found.tokens[end - 1]] is None:
        end -= 1
    ids, rows, gold = found.tokens[begin:end], rows[begin:end], gold[begin:end]
    segmentation, text = _segment_tokens(found.text, ids, tokens, counted)
    distributions = _derive_distributions(rows, gold, ids, tokens.vocabulary.size, tail, counted)
    check_distributions(distributions, tokens.vocabulary.size)
    known = distributions.gold[distributions.informed].astype(np.float64)
    guessed = len(ids) - len(known)
    counted["tokens_without_row"] += guessed
    trace = Trace(
        document="",
        text="" if text is None else store.fingerprint_text(text),
        size=segmentation.size,
        nats=float(-known.sum()) + guessed * math.log(tokens.vocabulary.size),
        tokens=segmentation.ids,
        starts=segmentation.starts,
        distributions=distributions,
        weights=np.zeros((len(ids), 0), np.float32),
    )
    return trace, text


def require_numbers(found: ForeignRecord, vocabulary_size: int) -> None:
    """Raise `ValueError` where a record has anything but ids of the vocabulary and log-probabilities."""
    for token in found.tokens:
        _require_id("token", token, vocabulary_size)
    for row in found.rows:
        for entry, logprob in row or ():
            _require_id("id", entry, vocabulary_size)
            _require_logprob(logprob)
            if math.isnan(logprob):
                raise ValueError(f"the log-probability of id {entry} is NaN")
    for logprob in found.gold:
        _require_logprob(logprob)


def _require_id(what: str, given: Any, vocabulary_size: int) -> None:
    if type(given) is not int:
        raise ValueError(f"{what} {given!r:.40} is a {type(given).__name__}, needs a whole number")
    if not 0 <= given < vocabulary_size:
        raise ValueError(
            f"{what} {given!r:.40} is outside the vocabulary of {vocabulary_size}; is it another tokenizer's?"
        )


def _require_logprob(given: Any) -> None:
    if type(given) not in (int, float):
        raise ValueError(f"{given!r:.40} is a {type(given).__name__}, needs a log-probability")
    if abs(given) == math.inf and given > 0:
        raise ValueError("a log-probability is infinite")


def _place_rows(found: ForeignRecord, ahead: bool) -> tuple[list[foreign.Entries | None], list[float]]:
    """Return rows and log-probabilities with row i at token i; a token without a row gets None."""
    rows, gold, count = list(found.rows), list(found.gold), len(found.tokens)
    if ahead:
        rows, gold = [None, *rows], [math.nan, *gold]
    if len(rows) > count + 1 or len(rows) < count - (0 if ahead else 1):
        raise ValueError(f"{len(found.rows)} rows, but {count} tokens")
    missing = max(count - len(rows), 0)
    return (rows + [None] * missing)[:count], (gold + [math.nan] * missing)[:count]


def _segment_tokens(
    text: str | None, ids: list[int], tokens: LayoutTokenizer, counted: Counter[str]
) -> tuple[Segmentation, str | None]:
    """Find where the tokens begin in the text; if there are only tokens, spell the text from them."""
    joined = b"".join(tokens.vocabulary.token_bytes[i] or b"" for i in ids)
    spelled = joined.decode("utf-8", "replace")
    candidates = [spelled, *([spelled[1:]] if spelled.startswith(" ") else [])] if text is None else [text]
    for candidate in candidates:
        segmentation = tokens.vocabulary.segment(candidate)
        if segmentation.ids.tolist() == ids:
            return segmentation, candidate
    if text is not None:
        ours = tokens.vocabulary.segment(text).ids.tolist()
        n = next(
            (n for n, pair in enumerate(zip(ours, ids, strict=False)) if pair[0] != pair[1]), min(len(ours), len(ids))
        )
        raise ValueError(
            f"token {n} of {len(ids)} is not the tokenizer's ({ids[n : n + 1]} and {ours[n : n + 1]}); "
            "--tokenizer names the one that made the file"
        )
    counted["documents_tokenized_otherwise"] += 1
    lengths = np.array([len(tokens.vocabulary.token_bytes[i] or b"") for i in ids], np.int64)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    whole = spelled if spelled.encode() == joined else None
    all_spelled = np.ones(len(ids), bool)
    return Segmentation(ids=np.array(ids, np.int32), starts=starts, spelled=all_spelled, size=len(joined)), whole


def _derive_distributions(
    rows: list[foreign.Entries | None],
    gold: list[float],
    tokens: list[int],
    vocabulary_size: int,
    tail: float | None,
    counted: Counter[str],
) -> Distributions:
    kept = [sorted((e for e in row or () if e[1] > foreign.PADDING_LOGPROB / 2), key=lambda e: -e[1]) for row in rows]
    offsets = np.append(0, np.cumsum([len(row) for row in kept])).astype(np.int64)
    ids = np.array([i for row in kept for i, _ in row], np.int32)
    logprobs = np.array([p for row in kept for _, p in row], np.float64)
    of, informed = np.repeat(np.arange(len(kept)), np.diff(offsets)), np.diff(offsets) > 0
    for row in kept:
        if len({i for i, _ in row}) < len(row):
            raise ValueError("an id is twice among the entries of one token")
    sums = np.bincount(of, np.exp(np.minimum(logprobs, 1.0)), minlength=len(kept))
    if (sums > LARGEST_SUM).any():
        n = int((sums > LARGEST_SUM).argmax())
        raise ValueError(
            f"token {n}: probabilities add up to {sums[n]:.2f}, more than 1; needs log-probabilities at temperature 1"
        )
    if tail is None:
        logprobs -= np.log(np.maximum(sums, 1.0))[of]
        rest = np.clip(1.0 - sums, SMALLEST_TAIL, 1.0)
        rest[np.diff(offsets) >= vocabulary_size] = 0.0
    else:
        with np.errstate(divide="ignore"):
            logprobs += (np.log1p(-tail) - np.log(np.where(informed, sums, 1.0)))[of]
        rest = np.full(len(kept), tail)
    # gold: as the record says; else the entry's; else an even share of the tail
    own = np.array(gold, np.float64)
    if (own > math.log(LARGEST_SUM)).any():
        n = int(np.nanargmax(own))
        raise ValueError(f"token {n}: its log-probability is {own[n]:.4g}, above 0")
    among = np.flatnonzero((ids == np.array(tokens, np.int64)[of]) & np.isnan(own)[of])
    own[of[among]] = logprobs[among]
    guessed = np.isnan(own) & informed
    counted["gold_estimated"] += int(guessed.sum())
    with np.errstate(divide="ignore"):
        own[guessed] = np.log((rest / np.maximum(vocabulary_size - np.diff(offsets), 1))[guessed])
    return Distributions(
        offsets=offsets,
        ids=ids,
        logprobs=np.minimum(logprobs, 0.0).astype(np.float32),
        gold=np.minimum(np.where(informed, own, 0.0), 0.0).astype(np.float32),
        tail=np.where(informed, rest, 1.0).astype(np.float32),
    )


def check_places(probed: list[ForeignRecord], ahead: bool, tokens: LayoutTokenizer) -> None:
    """Raise `ValueError` if tokens are among the entries of their neighbours' rows, but not of their own."""
    hits = {}
    for way in (False, True):
        found = [
            token in dict(row)
            for one in probed
            for token, row in zip(one.tokens, _place_rows(one, way)[0], strict=True)
            if row and token != tokens.context
        ]
        hits[way] = sum(found) / max(len(found), 1)
    if hits[not ahead] > 0.5 and hits[ahead] < 0.5 * hits[not ahead]:
        names = {False: "own", True: "next"}
        raise ValueError(
            f"{hits[ahead]:.0%} of the tokens are among their rows' entries, and {hits[not ahead]:.0%} with "
            f"--rows {names[not ahead]}; add that, or --rows {names[ahead]} if it is right"
        )


def check_sums(probed: list[ForeignRecord], tail: float | None, vocabulary_size: int) -> None:
    """Raise `ValueError` where rows were renormalised but `tail` does not say what was cut off, or the reverse."""
    sums = np.array(
        [
            math.fsum(math.exp(min(p, 1.0)) for _, p in row)
            for one in probed
            for row in one.rows
            if row and len(row) < vocabulary_size and any(p > foreign.PADDING_LOGPROB / 2 for _, p in row)
        ]
    )
    share = float((np.abs(sums - 1) < 1e-3).mean()) if len(sums) else 0.0
    if tail is None and share >= RENORMALISED:
        raise ValueError(
            f"{share:.0%} of the rows sum to 1: what was cut off is not known, because they were renormalised; "
            "say what share it was with --tail 0.05 (--tail 0: nothing)"
        )
    if tail is not None and len(sums) and share < RENORMALISED:
        raise ValueError(f"--tail: only {share:.0%} of the rows sum to 1, so what they leave is their tail; drop it")
