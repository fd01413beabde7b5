"""Find the stretches of a text that both a source's tokens and a target's spell, and join rows by stretch.

A token may cover bytes without spelling them, such as an unknown character or a capital that was lowercased. No model
predicts those bytes, so rows there have no entries. After them, a new stretch begins where a token of each tokenizer
begins at the same byte. docs/tokenizers.md explains this.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray

from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace


class Stretch(NamedTuple):
    """Hold a stretch: the source's tokens and rows, and the target's tokens, with the bytes where they begin.

    Byte p of the text is `stream[p + 1]`, because a tokenizer may put a space at -1; `begins` count bytes of `stream`.
    """

    tokens: Int[ndarray, "rows"]
    begins: Int[ndarray, "rows"]
    distributions: Distributions
    target_ids: Int[ndarray, "tokens"]
    target_begins: Int[ndarray, "tokens+1"]
    stream: UInt8[ndarray, "bytes"]


def cut_into_stretches(
    source: Vocabulary, trace: Trace, segmentation: Segmentation, data: bytes
) -> Iterator[tuple[slice, Stretch]]:
    """Yield the stretches of a trace and the target's segmentation of its text, each with its slice of the latter."""
    stream = np.frombuffer(b" " + data, np.uint8)
    begins = trace.starts.astype(np.int64) + 1
    target_begins = np.append(segmentation.starts.astype(np.int64) + 1, len(stream))
    spelled = source.find_spelled_bytes(trace.tokens, trace.starts, data)
    edges = np.append(begins, len(stream))
    for rows, tokens in find_stretches(edges, spelled, target_begins, segmentation.spelled):
        yield (
            tokens,
            Stretch(
                tokens=trace.tokens[rows],
                begins=begins[rows],
                distributions=take_rows(trace.distributions, rows),
                target_ids=segmentation.ids[tokens],
                target_begins=target_begins[tokens.start : tokens.stop + 1],
                stream=stream,
            ),
        )


def find_stretches(
    source_edges: Int[ndarray, "row_edges"],
    source_spelled: Bool[ndarray, "rows"],
    target_edges: Int[ndarray, "token_edges"],
    target_spelled: Bool[ndarray, "tokens"],
) -> Iterator[tuple[slice, slice]]:
    """Yield slices of source rows and target tokens that cover the same stretch, in the order of the text.

    The first slices begin at the first row and token, even if only one of them has a space before the text.
    """
    if source_spelled.all() and target_spelled.all():
        yield slice(0, len(source_spelled)), slice(0, len(target_spelled))
        return
    targets = _find_runs(target_spelled)
    for first, stop in _find_runs(source_spelled):
        for target_first, target_stop in targets:
            if first == target_first == 0:
                row = token = 0
            else:
                shared, rows, tokens = np.intersect1d(
                    source_edges[first:stop], target_edges[target_first:target_stop], return_indices=True
                )
                if not len(shared):
                    continue
                row, token = first + int(rows[0]), target_first + int(tokens[0])
            end = np.searchsorted(target_edges[token + 1 : target_stop + 1], source_edges[stop], side="right")
            if end == 0:
                continue
            last = int(target_edges[token + end])
            rows_end = row + int(np.searchsorted(source_edges[row:stop], last))
            yield slice(row, max(rows_end, row + 1)), slice(token, token + int(end))


def take_rows(d: Distributions, rows: slice) -> Distributions:
    """Return the distributions of some rows."""
    if rows == slice(0, len(d)):
        return d
    entries = slice(int(d.offsets[rows.start]), int(d.offsets[rows.stop]))
    return Distributions(
        offsets=d.offsets[rows.start : rows.stop + 1] - d.offsets[rows.start],
        ids=d.ids[entries],
        logprobs=d.logprobs[entries],
        gold=d.gold[rows],
        tail=d.tail[rows],
    )


def place_rows(count: int, parts: Sequence[tuple[slice, Distributions]]) -> Distributions:
    """Return `count` rows that have the parts in their places and no information elsewhere."""
    if len(parts) == 1 and len(parts[0][1]) == count:
        return parts[0][1]
    counts, gold, tail = np.zeros(count, np.int64), np.zeros(count, np.float32), np.ones(count, np.float32)
    for place, part in parts:
        counts[place], gold[place], tail[place] = part.counts, part.gold, part.tail
    empty = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Distributions(
        offsets=np.append(0, np.cumsum(counts)),
        ids=np.concatenate([empty[0], *(part.ids for _, part in parts)]),
        logprobs=np.concatenate([empty[1], *(part.logprobs for _, part in parts)]),
        gold=gold,
        tail=tail,
    )


def clear_rows(d: Distributions, cleared: Bool[ndarray, "tokens"]) -> Distributions:
    """Return the same rows, without information where `cleared` is set."""
    kept = ~cleared[d.rows]
    return replace(
        d,
        offsets=np.append(0, np.cumsum(np.where(cleared, 0, d.counts))),
        ids=d.ids[kept],
        logprobs=d.logprobs[kept],
        gold=np.where(cleared, np.float32(0.0), d.gold),
        tail=np.where(cleared, np.float32(1.0), d.tail),
    )


def _find_runs(flags: Bool[ndarray, "items"]) -> list[tuple[int, int]]:
    """List where runs of set flags begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
