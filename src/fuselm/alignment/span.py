"""Follow a source's distributions along the bytes of a text, into the target's vocabulary: `span`.

This is a filter over the tokens that the source may be writing. Wherever a source token begins, the entries of its row
leave the gold path, each spelled in the target's tokens. All entries that agree with the target's tokens so far vote
for their next token, and the token that comes decides which of them continue. By the chain rule, the probabilities of
the target's tokens multiply to the source's own probability of the text, however the two tokenizers split it. See "span
alignment" in docs/paper.md.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

from fuselm.alignment import continuation
from fuselm.alignment.continuation import Continuations, lengthen
from fuselm.alignment.next_tokens import NextTokens, find_slot, new_next_tokens, sort_by_mass
from fuselm.alignment.spelling import Spelling, find_child
from fuselm.alignment.stretches import cut_into_stretches, place_rows
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace
from fuselm.system import index_checks
from fuselm.system.compiling import compiled

CAUSES = ("tail of the source", "no text", "unknown continuation", "cut")  # reasons why mass reaches no target id
# An entry that has left the gold path. Its next target tokens are steps of the spelling or, if its row begins inside a
# target token, tokens of the continuation. `token` is the next one, and `candidate` its place in the table.
ENTRY = np.dtype(
    [("mass", "f8"), ("at", "i4"), ("stop", "i4"), ("token", "i4"), ("candidate", "i4"), ("continued", "i4")]
)
# The tail of a row. The trie tells how many ids continue like the target's tokens so far, and the row's entries, from
# `first` to `stop`, tell which of them were kept.
TAIL = np.dtype([("mass", "f8"), ("node", "i4"), ("first", "i4"), ("stop", "i4")])
MOST_OPEN_TAILS = 64  # the mass of further tails counts as lost


class _SourceRows(NamedTuple):
    """Hold a trace's arrays: one item a row, entries by `offsets`, and probabilities instead of their logarithms."""

    tokens: Int[ndarray, "rows"]
    begins: Int[ndarray, "rows"]
    offsets: Int[ndarray, "rows+1"]
    ids: Int[ndarray, "entries"]
    masses: Float[ndarray, "entries"]
    gold: Float[ndarray, "rows"]
    tail: Float[ndarray, "rows"]


def follow_text(
    source: Vocabulary,
    target: Vocabulary,
    spelling: Spelling,
    trace: Trace,
    segmentation: Segmentation,
    data: bytes,
    top_k: int,
) -> tuple[Distributions, Float[ndarray, "tokens causes"]]:
    """Return the distributions of the target's tokens, and the mass that reached no id, by `CAUSES`.

    That mass sums to a row's tail. A target token without text of its own gets no entries. The ids that a source's row
    did not keep share its tail evenly. Where one of the tokenizers does not spell the text, rows have no entries
    (stretches.py).

    Raises:
        ValueError: If the trace, the segmentation or the spelling does not belong to this text and these vocabularies.
    """
    require_trace(trace, source.size, len(data))
    index_checks.require_within("a target token", segmentation.ids, target.size)
    index_checks.require_within("where a target token begins", segmentation.starts, len(data) + 1, start=-1)
    index_checks.require_ascending("target tokens", segmentation.starts)
    index_checks.require_lengths("spelling", source.size, spelling.begins)
    index_checks.require_lengths("spelling", target.size, spelling.ids_begun)
    parts, lost = [], np.zeros((len(segmentation.ids), len(CAUSES)), np.float32)
    for tokens, stretch in cut_into_stretches(source, trace, segmentation, data):
        part, lost[tokens] = _follow_stretch(source, target, spelling, *stretch, top_k)
        parts.append((tokens, part))
    return place_rows(len(segmentation.ids), parts), lost


def _follow_stretch(
    source: Vocabulary,
    target: Vocabulary,
    spelling: Spelling,
    tokens: Int[ndarray, "rows"],
    begins: Int[ndarray, "rows"],
    d: Distributions,
    target_ids: Int[ndarray, "tokens"],
    target_begins: Int[ndarray, "tokens+1"],
    stream: UInt8[ndarray, "bytes"],
    top_k: int,
) -> tuple[Distributions, Float[ndarray, "tokens causes"]]:
    """Follow rows along target tokens; both spell the stretch, and both begin at the same byte, except for a space."""
    starts = continuation.find_row_starts(stream, begins, target_begins)
    agreeing = 1.0  # share of the first row's ids that begin with the space that is hidden from the target
    if starts.hidden:
        agreeing = source.count_continuing(stream[: starts.hidden].tobytes()) / max(source.count_with_bytes(), 1)
    offsets, ids, masses, gold, tail, lost = _follow(
        _SourceRows(tokens, begins, d.offsets, d.ids, _exp(d.logprobs), _exp(d.gold), d.tail),
        target_ids,
        target_begins,
        spelling,
        continuation.spell_continuations(source, target, d, starts),
        agreeing,
        top_k,
    )
    return Distributions(offsets=offsets, ids=ids, logprobs=_log(masses), gold=_log(gold), tail=tail), lost


def require_trace(trace: Trace, vocabulary_size: int, size: int) -> None:
    """Raise `ValueError` unless a trace belongs to a text of `size` bytes and a vocabulary of `vocabulary_size` ids."""
    d, what = trace.distributions, f"document {trace.document}"
    index_checks.require_within(f"{what}: token", trace.tokens, vocabulary_size)
    index_checks.require_within(f"{what}: id", d.ids, vocabulary_size)
    index_checks.require_within(f"{what}: where a token begins", trace.starts, size + 1, start=-1)
    index_checks.require_ascending(f"{what}: tokens", trace.starts)
    index_checks.require_offsets(what, d.offsets, len(d.ids))
    index_checks.require_lengths(what, len(d.ids), d.logprobs)
    index_checks.require_lengths(what, len(d.offsets) - 1, trace.tokens, trace.starts, d.gold, d.tail)


def _exp(logprobs: Float[ndarray, "_"]) -> Float[ndarray, "_"]:
    return np.exp(logprobs, dtype=np.float64)


def _log(masses: Float[ndarray, "_"]) -> Float[ndarray, "_"]:
    with np.errstate(divide="ignore"):
        return np.minimum(np.log(masses), 0.0).astype(np.float32)


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _follow(
    rows: _SourceRows,
    target_ids: ndarray,
    target_begins: ndarray,
    spelling: Spelling,
    continued: Continuations,
    agreeing: float,
    top_k: int,
) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, ndarray]:
    count = len(target_ids)
    offsets, lost = np.zeros(count + 1, np.int64), np.zeros((count, len(CAUSES)), np.float32)
    ids, masses, filled = np.empty(16 * count, np.int32), np.empty(16 * count), 0
    gold, tail = np.ones(count), np.ones(count, np.float32)

    path, row = 1.0, 0  # `path` is the mass of the gold path; it and the mass of the live entries and tails sum to 1
    live, moved, entries = np.empty(256, ENTRY), np.empty(257, np.int32), 0
    tails, open_tails = np.empty(MOST_OPEN_TAILS, TAIL), 0
    table = new_next_tokens(256)
    for i in range(count):
        token, end = target_ids[i], target_begins[i + 1]
        offsets[i + 1] = filled
        if target_begins[i] == end or len(rows.tokens) == 0:
            continue
        unspelled = beyond = 0.0
        known = path
        for h in range(entries):
            known += live[h].mass
        for t in range(open_tails):
            known += tails[t].mass
        while row < len(rows.tokens) and (rows.begins[row] < end or row == 0):
            most = entries + rows.offsets[row + 1] - rows.offsets[row] + 1
            if most > len(live):
                live, moved = lengthen(live, 2 * most), np.empty(2 * most + 1, np.int32)
                table = new_next_tokens(2 * most)
            first = entries
            path, entries, rest, wordless = _leave(rows, row, path, live, entries, spelling, continued, agreeing)
            unspelled += wordless
            if continued.base[row] < 0 and open_tails < MOST_OPEN_TAILS:
                newest = tails[open_tails]
                newest.mass, newest.node, newest.first, newest.stop = rest, 0, first, entries
                open_tails += 1
            else:
                beyond += rest
            row += 1

        candidates, voteless = _vote(table, token, path, live[:entries])
        unspelled += voteless
        still_open = 0
        for t in range(open_tails):
            kept, kept_beyond = _count_kept(table, candidates, token, live[tails[t].first : tails[t].stop])
            node, mass = tails[t].node, tails[t].mass
            unkept = spelling.ids_beyond[node] - kept
            if unkept <= 0:
                beyond += mass
                continue
            per_id = mass / unkept
            beyond += mass - _share(table, candidates, node, per_id, spelling)
            node = find_child(spelling, node, token)
            mass = per_id * (spelling.ids_beyond[node] - kept_beyond) if node >= 0 else 0.0
            if mass > 0.0:
                tails[still_open] = tails[t]
                tails[still_open].mass, tails[still_open].node = mass, node
                still_open += 1
        open_tails = still_open

        # the row of target token i
        here = table.masses[0]
        sort_by_mass(table, candidates)
        if filled + candidates > len(ids):
            ids, masses = lengthen(ids, 2 * (filled + candidates)), lengthen(masses, 2 * (filled + candidates))
        total = whole = 0.0
        for rank in range(candidates):
            mass = table.masses[table.order[rank]]
            whole += mass
            if rank < top_k and mass > 0.0:
                ids[filled], masses[filled] = table.ids[table.order[rank]], mass
                total += mass
                filled += 1
        table.slots[:] = -1
        offsets[i + 1] = filled
        gold[i] = here
        tail[i] = min(max(1.0 - total, 0.0), 1.0)
        lost[i, 0], lost[i, 1], lost[i, 3] = beyond, unspelled, whole - total
        lost[i, 2] = max(1.0 - known, 0.0)

        # what agrees with the token continues
        if here <= 0.0:  # too small for a float
            path, entries, open_tails = 1.0, 0, 0
            continue
        path /= here
        continuing = 0
        for h in range(entries):
            moved[h] = continuing
            if live[h].token != token:
                continue
            live[continuing] = live[h]
            entry = live[continuing]
            entry.at += 1
            entry.mass /= here
            if entry.at < entry.stop:
                entry.token = continued.tokens[entry.at] if entry.continued else spelling.steps[entry.at].token
                continuing += 1
            elif row < len(rows.tokens) and rows.begins[row] == end:  # another way to the place of the gold path
                path += entry.mass
        moved[entries] = entries = continuing
        for t in range(open_tails):
            tails[t].mass /= here
            tails[t].first, tails[t].stop = moved[tails[t].first], moved[tails[t].stop]
    return offsets, ids[:filled].copy(), masses[:filled].copy(), gold, tail, lost


@compiled(nogil=True)
@no_type_check
def _leave(
    rows: _SourceRows,
    row: int,
    path: float,
    live: ndarray,
    entries: int,
    spelling: Spelling,
    continued: Continuations,
    agreeing: float,
) -> tuple[float, int, float, float]:
    """Let the entries of a row leave the gold path, whose mass is `path`, and join the first `entries` of `live`.

    Return the mass that stays on the path, the new number of entries, and the mass of the row's tail and of its entries
    without text. The gold entry joins with mass 0, because the path itself represents it.
    """
    base, token = continued.base[row], rows.tokens[row]
    on_path, rest, wordless, first = rows.gold[row], np.float64(rows.tail[row]), 0.0, entries
    gold_is_kept = False
    for e in range(rows.offsets[row], rows.offsets[row + 1]):
        mass = path * rows.masses[e]
        if rows.ids[e] == token:
            gold_is_kept, mass = True, 0.0
        entry = live[entries]
        if base < 0:
            begin = spelling.begins[rows.ids[e]]
            entry.at, entry.stop, entry.token = begin.at, begin.stop, begin.token
        else:
            m = base + e - rows.offsets[row]
            entry.at, entry.stop = continued.offsets[m], continued.offsets[m + 1]
            entry.token = continued.tokens[entry.at] if entry.at < entry.stop else -1
        if entry.at == entry.stop:
            wordless += mass
            continue
        entry.mass, entry.continued = mass, base >= 0
        entries += 1
    if not gold_is_kept:
        rest = max(rest - on_path, 0.0)
        begin = spelling.begins[token]
        if base < 0 and begin.at < begin.stop:
            entry = live[entries]
            entry.at, entry.stop, entry.token = begin.at, begin.stop, begin.token
            entry.mass, entry.continued = 0.0, False
            entries += 1
    if row == 0 and agreeing < 1.0:  # entries that do not begin with the hidden space are impossible
        rest *= agreeing
        wordless = 0.0
        total = on_path + rest
        for h in range(first, entries):
            total += live[h].mass
        for h in range(first, entries):
            live[h].mass /= total
        on_path /= total
        rest /= total
    return path * on_path, entries, path * rest, wordless


@compiled(nogil=True)
@no_type_check
def _vote(table: NextTokens, token: int, path: float, live: ndarray) -> tuple[int, float]:
    """Let every entry vote for its next token, and the gold path for `token`.

    Return how many tokens got votes, and the mass of the entries whose next token is unknown.
    """
    table.ids[0], table.masses[0] = token, path
    table.slots[find_slot(table, token)] = 0
    candidates, voteless = 1, 0.0
    for entry in live:
        entry.candidate = -1
        if entry.mass == 0.0:
            continue
        if entry.token < 0:
            voteless += entry.mass
            continue
        slot = find_slot(table, entry.token)
        if table.slots[slot] < 0:
            table.ids[candidates], table.masses[candidates], table.slots[slot] = entry.token, 0.0, candidates
            candidates += 1
        entry.candidate = table.slots[slot]
        table.masses[entry.candidate] += entry.mass
    return candidates, voteless


@compiled(nogil=True)
@no_type_check
def _count_kept(table: NextTokens, candidates: int, token: int, live: ndarray) -> tuple[int, int]:
    """Count the entries of a tail's row that are still live, and those of them that continue beyond `token`.

    `table.kept` gets the number of them that vote for each id.
    """
    table.kept[:candidates] = 0
    beyond = 0
    for entry in live:
        candidate = entry.candidate
        if candidate < 0 and entry.token >= 0:
            candidate = table.slots[find_slot(table, entry.token)]
        if candidate >= 0:
            table.kept[candidate] += 1
        beyond += entry.token == token and entry.at + 1 < entry.stop
    return len(live), beyond


@compiled(nogil=True)
@no_type_check
def _share(table: NextTokens, candidates: int, node: int, per_id: float, spelling: Spelling) -> float:
    """Add a tail's share to the masses of the candidates, and return the sum of what was added.

    A candidate gets `per_id` for each id of the source that continues with it after `node` and was not kept.
    """
    shared = 0.0
    first, stop = spelling.first_child[node], spelling.first_child[node + 1]
    if node > 0 and stop - first < candidates:
        for c in range(first, stop):
            candidate = table.slots[find_slot(table, spelling.child_tokens[c])]
            if candidate >= 0:
                mass = per_id * max(spelling.ids_below[spelling.child_nodes[c]] - table.kept[candidate], 0)
                table.masses[candidate] += mass
                shared += mass
        return shared
    for candidate in range(candidates):
        if node == 0:
            ids = spelling.ids_begun[table.ids[candidate]]
        else:
            below = find_child(spelling, node, table.ids[candidate])
            ids = spelling.ids_below[below] if below >= 0 else 0
        mass = per_id * max(ids - table.kept[candidate], 0)
        table.masses[candidate] += mass
        shared += mass
    return shared
