"""`span`: a source's distributions followed along the bytes of a text, into the target's vocabulary. docs/paper.md

A filter over what the source may be in the midst of. Wherever a source token begins, its row's entries leave the gold
path, each as the target's tokens for it; all that have agreed with the target's tokens so far say which is next, and
the one that comes decides which of them go on. So by the chain rule the probabilities of the target's tokens multiply
to the source's own of the text, whatever the two segmentations are.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm import bpe
from fuselm.distributions import Distributions
from fuselm.store import Trace
from fuselm.vocabulary import Segmentation, Vocabulary

CAUSES = ("tail of the source", "no text", "unknown continuation", "cut")  # why mass reaches no target id
# An entry that has left the gold path: its target tokens that are still to come, and the row it is of.
ENTRY = np.dtype([("at", "i8"), ("stop", "i8"), ("mass", "f8"), ("row", "i8"), ("continued", "i8")])
# The tail of a row: how many of its ids go on like the target's tokens so far is told by the trie.
TAIL = np.dtype([("mass", "f8"), ("node", "i8"), ("row", "i8")])


class Spelling(NamedTuple):
    """The target's tokens for every id of a source, and a trie of them.

    Id x is spelled `tokens[offsets[x]:offsets[x+1]]`, nothing if it stands for no text. A node of the trie is a
    sequence of target tokens, 0 the empty one; `ids_below[node]` is how many ids begin with it, `ids_beyond[node]` how
    many of those are longer, `ids_begun[token]` how many begin with a token.
    """

    offsets: Int[ndarray, "source_vocabulary+1"]
    tokens: Int[ndarray, "_"]
    ids_below: Int[ndarray, "nodes"]
    ids_beyond: Int[ndarray, "nodes"]
    ids_begun: Int[ndarray, "target_vocabulary"]
    edges: Int[ndarray, "slots"]  # node * target size + token
    children: Int[ndarray, "slots"]


class Continued(NamedTuple):
    """The target's tokens for entries of rows that begin inside a target token, together with what it has before them.

    Entry m of a row is spelled `tokens[offsets[base + m]:offsets[base + m + 1]]`, `base` being -1 for all other rows.
    """

    base: Int[ndarray, "rows"]
    offsets: Int[ndarray, "_"]
    tokens: Int[ndarray, "_"]


def spell(source: Vocabulary, target: Vocabulary) -> Spelling:
    """Every source id in the target's tokens, as its tokenizer would go on with it."""
    known = [i for i, string in enumerate(source.token_bytes) if string is not None]
    known_offsets, tokens = _flat(target.encode_bytes([source.token_bytes[i] or b"" for i in known]))
    counts = np.zeros(source.size, np.int64)
    counts[known] = np.diff(known_offsets)
    offsets = np.append(0, np.cumsum(counts))
    edges = bpe.new_table(len(tokens))
    children = np.zeros(len(edges), np.int32)
    ids_below, ids_beyond = _plant(offsets, tokens, edges, children, target.size)
    first = tokens[offsets[:-1][counts > 0]]
    ids_begun = np.bincount(first[first >= 0], minlength=target.size).astype(np.int32)
    return Spelling(offsets, tokens, ids_below, ids_beyond, ids_begun, edges, children)


def follow(
    source: Vocabulary,
    target: Vocabulary,
    spelling: Spelling,
    trace: Trace,
    segmentation: Segmentation,
    data: bytes,
    top_k: int,
) -> tuple[Distributions, Float[ndarray, "tokens causes"]]:
    """The distributions of the target's tokens, and the mass that reached no id, by `CAUSES`: it sums to the tail.

    A target token without text of its own gets no entries. Of a row's tail, each id that was not kept is taken to have
    the same share.
    """
    d = trace.distributions
    stream = b" " + data  # byte p of the text is stream[p + 1]: a tokenizer may put a space at -1
    begins = trace.starts.astype(np.int64) + 1
    target_begins = np.append(segmentation.starts.astype(np.int64) + 1, len(stream))
    within, hidden = _beginnings(begins, target_begins)
    continue_rows = _continue_by_tokenizer if target.merges is None else _continue_by_merges
    continued = continue_rows(source, target, trace, stream, begins, within, hidden)
    agreeing = 1.0  # share of the first row's ids that agree with the space that is hidden from the target
    if hidden:
        agreeing = source.count_continuing(stream[:hidden]) / max(source.count_with_bytes(), 1)
    offsets, ids, logprobs, gold, tail, lost = _follow(
        _Rows(trace.tokens, begins, d.offsets, d.ids, d.logprobs, d.gold, d.tail),
        segmentation.ids,
        target_begins,
        spelling,
        continued,
        agreeing,
        target.size,
        top_k,
    )
    return Distributions(offsets=offsets, ids=ids, logprobs=logprobs, gold=gold, tail=tail), lost


def _beginnings(begins: Int[ndarray, "rows"], target_begins: Int[ndarray, "edges"]) -> tuple[Int[ndarray, "rows"], int]:
    """How many bytes of the target token that it begins in lie before each source row; and how many bytes of the first
    row are hidden from the target: one if the source alone puts a space before the text.
    """
    if not len(begins) or len(target_begins) == 1:
        return np.zeros(len(begins), np.int64), 0
    within = begins - target_begins[:-1][np.searchsorted(target_begins[:-1], begins, side="right").clip(1) - 1]
    within[0] = max(begins[0] - target_begins[0], 0)
    return within, int(max(target_begins[0] - begins[0], 0))


def _continue_by_tokenizer(
    source: Vocabulary,
    target: Vocabulary,
    trace: Trace,
    stream: bytes,
    begins: Int[ndarray, "rows"],
    within: Int[ndarray, "rows"],
    hidden: int,
) -> Continued:
    base = np.full(len(begins), -1, np.int64)
    strings: list[bytes] = []
    for row in np.flatnonzero((within > 0) | ((np.arange(len(begins)) == 0) & (hidden > 0))).tolist():
        base[row] = len(strings)
        before, unseen = stream[begins[row] - within[row] : begins[row]], stream[: hidden if row == 0 else 0]
        for token in trace.distributions.row(row)[0]:
            string = source.token_bytes[token] or b""
            strings.append(before + string[len(unseen) :] if string and string.startswith(unseen) else b"")
    return Continued(base, *_flat(target.encode_bytes(strings)))


def _continue_by_merges(
    source: Vocabulary,
    target: Vocabulary,
    trace: Trace,
    stream: bytes,
    begins: Int[ndarray, "rows"],
    within: Int[ndarray, "rows"],
    hidden: int,
) -> Continued:
    d = trace.distributions
    text = np.frombuffer(stream, np.uint8)
    return Continued(*_continue(target.merges, text, begins, within, hidden, d.offsets, d.ids, *source.packed_bytes))


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[Int[ndarray, "offsets"], Int[ndarray, "_"]]:
    offsets = np.append(0, np.cumsum([len(s) for s in sequences])).astype(np.int64)
    return offsets, np.fromiter((t for s in sequences for t in s), np.int32, int(offsets[-1]))


@numba.njit(cache=True, nogil=True)
@no_type_check  # of a function that a checker wraps, numba can't keep what it compiled
def _plant(offsets: ndarray, tokens: ndarray, edges: ndarray, children: ndarray, size: int):
    """Fill the trie's table; return `ids_below` and `ids_beyond`."""
    ids_below, ids_ended = np.zeros(len(tokens) + 1, np.int32), np.zeros(len(tokens) + 1, np.int32)
    nodes = 1
    for x in range(len(offsets) - 1):
        if offsets[x] == offsets[x + 1]:
            continue
        node = 0
        ids_below[0] += 1
        spelled = True
        for token in tokens[offsets[x] : offsets[x + 1]]:
            if token < 0:
                spelled = False
                break
            slot = bpe.slot_of(edges, node * size + token)
            if edges[slot] == bpe.NOTHING:
                edges[slot], children[slot] = node * size + token, nodes
                nodes += 1
            node = children[slot]
            ids_below[node] += 1
        ids_ended[node] += spelled
    return ids_below[:nodes].copy(), ids_below[:nodes] - ids_ended[:nodes]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _child(spelling: Spelling, node: int, token: int, size: int) -> int:
    """The node after one more token; -1 if no id goes on so."""
    slot = bpe.slot_of(spelling.edges, node * size + token)
    return spelling.children[slot] if spelling.edges[slot] != bpe.NOTHING else -1


@numba.njit(cache=True, nogil=True)
@no_type_check
def _continue(
    merges: bpe.Merges,
    stream: ndarray,
    begins: ndarray,
    within: ndarray,
    hidden: int,
    offsets: ndarray,
    ids: ndarray,
    source_offsets: ndarray,
    source_bytes: ndarray,
) -> tuple[ndarray, ndarray, ndarray]:
    base, entries, longest = np.full(len(begins), -1, np.int64), 0, 0
    for row in range(len(begins)):
        if within[row] > 0 or (row == 0 and hidden > 0):
            base[row] = entries
            entries += offsets[row + 1] - offsets[row]
            for x in ids[offsets[row] : offsets[row + 1]]:
                longest = max(longest, within[row] + source_offsets[x + 1] - source_offsets[x])
    string, ranked, spelled = np.empty(longest, np.uint8), np.empty(longest, np.int64), np.empty(longest, np.int32)
    result_offsets, tokens, filled = np.zeros(entries + 1, np.int64), np.empty(4 * entries + longest, np.int32), 0
    for row in range(len(begins)):
        if base[row] < 0:
            continue
        before, unseen = within[row], hidden if row == 0 else 0
        for k in range(before):
            string[k] = stream[begins[row] - before + k]
        for e in range(offsets[row], offsets[row + 1]):
            own, length = source_offsets[ids[e]], source_offsets[ids[e] + 1] - source_offsets[ids[e]]
            agrees = length >= max(unseen, 1)
            for k in range(unseen):
                agrees = agrees and source_bytes[own + k] == stream[k]
            if agrees:
                for k in range(unseen, length):
                    string[before + k - unseen] = source_bytes[own + k]
                count = bpe.encode(merges, string[: before + length - unseen], spelled, ranked)
                if filled + count > len(tokens):
                    tokens = _grown(tokens, 2 * len(tokens) + count)
                for k in range(count):
                    tokens[filled + k] = spelled[k]
                filled += count
            result_offsets[base[row] + e - offsets[row] + 1] = filled
    return base, result_offsets, tokens[:filled].copy()


class _Rows(NamedTuple):
    """A trace, its arrays by row, entries by `offsets`."""

    tokens: Int[ndarray, "rows"]
    begins: Int[ndarray, "rows"]
    offsets: Int[ndarray, "rows+1"]
    ids: Int[ndarray, "entries"]
    logprobs: Float[ndarray, "entries"]
    gold: Float[ndarray, "rows"]
    tail: Float[ndarray, "rows"]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _follow(
    rows: _Rows,
    target_ids: ndarray,
    target_begins: ndarray,
    spelling: Spelling,
    continued: Continued,
    agreeing: float,
    size: int,
    top_k: int,
) -> tuple[ndarray, ndarray, ndarray, ndarray, ndarray, ndarray]:
    count = len(target_ids)
    offsets, lost = np.zeros(count + 1, np.int64), np.zeros((count, len(CAUSES)), np.float32)
    ids, logprobs = np.empty(16 * count, np.int32), np.empty(16 * count, np.float32)
    gold, tail = np.zeros(count, np.float32), np.ones(count, np.float32)

    path, row, filled = 1.0, 0, 0  # `path`: mass of the gold path; with all that left it and goes on, it sums to 1
    live, entries = np.empty(256, ENTRY), 0
    tails, open_tails = np.empty(64, TAIL), 0
    ballot = _new_ballot(256)
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
            if most >= len(live):
                live = _grown(live, 2 * most)
                ballot = _new_ballot(2 * most)
            left, entries, rest, wordless = _leave(rows, row, path, live, entries, spelling, continued, agreeing)
            unspelled += wordless
            if continued.base[row] < 0 and open_tails < len(tails):
                tails[open_tails].mass, tails[open_tails].node, tails[open_tails].row = rest, 0, row
                open_tails += 1
            else:
                beyond += rest
            path = left
            row += 1

        # every one votes for its next token
        ballot.ids[0], ballot.masses[0] = token, path
        ballot.slots[_slot(ballot, token)] = 0
        candidates = 1
        for h in range(entries):
            if live[h].mass == 0.0:
                continue
            next_token = _next(live[h], spelling, continued)
            if next_token < 0:
                unspelled += live[h].mass
                continue
            slot = _slot(ballot, next_token)
            candidate = ballot.slots[slot]
            if candidate < 0:
                candidate = candidates
                ballot.ids[candidate], ballot.masses[candidate], ballot.slots[slot] = next_token, 0.0, candidate
                candidates += 1
            ballot.masses[candidate] += live[h].mass
        still_open = 0
        for t in range(open_tails):
            live_kept, kept_beyond = _count_kept(tails[t], live[:entries], token, ballot, candidates, spelling)
            unkept = spelling.ids_beyond[tails[t].node] - live_kept
            if unkept <= 0:
                beyond += tails[t].mass
                continue
            per_id = tails[t].mass / unkept
            beyond += tails[t].mass - _share(tails[t].node, per_id, ballot, candidates, spelling, size)
            node = _child(spelling, tails[t].node, token, size)
            mass = per_id * (spelling.ids_beyond[node] - kept_beyond) if node >= 0 else 0.0
            if mass > 0.0:
                tails[still_open].mass, tails[still_open].node, tails[still_open].row = mass, node, tails[t].row
                still_open += 1
        open_tails = still_open

        # the row of target token i
        here = ballot.masses[0]
        _sort(ballot, candidates)
        if filled + candidates > len(ids):
            ids, logprobs = _grown(ids, 2 * (filled + candidates)), _grown(logprobs, 2 * (filled + candidates))
        total = whole = 0.0
        for rank in range(candidates):
            mass = ballot.masses[ballot.order[rank]]
            whole += mass
            if rank < top_k and mass > 0.0:
                ids[filled], logprobs[filled] = ballot.ids[ballot.order[rank]], min(np.log(mass), 0.0)
                total += mass
                filled += 1
        offsets[i + 1] = filled
        for slot in range(len(ballot.slots)):
            ballot.slots[slot] = -1
        gold[i] = min(np.log(here), 0.0) if here > 0.0 else -np.inf
        tail[i] = min(max(1.0 - total, 0.0), 1.0)
        lost[i, 0], lost[i, 1], lost[i, 3] = beyond, unspelled, whole - total
        lost[i, 2] = max(1.0 - known, 0.0)

        # what agrees with it goes on
        if here <= 0.0:  # too small for a float
            path, entries, open_tails = 1.0, 0, 0
            continue
        path /= here
        going = 0
        for h in range(entries):
            if _next(live[h], spelling, continued) != token:
                continue
            live[going] = live[h]
            live[going].at += 1
            live[going].mass /= here
            if live[going].at < live[going].stop:
                going += 1
            elif row < len(rows.tokens) and rows.begins[row] == end:  # another way to where the gold path is
                path += live[going].mass
        entries = going
        for t in range(open_tails):
            tails[t].mass /= here
    return offsets, ids[:filled].copy(), logprobs[:filled].copy(), gold, tail, lost


@numba.njit(cache=True, nogil=True)
@no_type_check
def _leave(
    rows: _Rows,
    row: int,
    path: float,
    live: ndarray,
    entries: int,
    spelling: Spelling,
    continued: Continued,
    agreeing: float,
) -> tuple[float, int, float, float]:
    """The entries of a row leave the gold path, which has mass `path`, and join `live`, now `entries` of them.

    Returns the mass that stays on the path, how many entries there are now, and the mass of the row's tail and of its
    entries without text. The gold entry joins with mass 0: it is known to the path by what became of it.
    """
    base, token = continued.base[row], rows.tokens[row]
    on_path, rest, wordless, first = np.exp(np.float64(rows.gold[row])), np.float64(rows.tail[row]), 0.0, entries
    gold_is_kept = False
    for e in range(rows.offsets[row], rows.offsets[row + 1]):
        x = rows.ids[e]
        mass = np.exp(np.float64(rows.logprobs[e]))
        if x == token:
            gold_is_kept, mass = True, 0.0
        if base < 0:
            at, stop = spelling.offsets[x], spelling.offsets[x + 1]
        else:
            m = base + e - rows.offsets[row]
            at, stop = continued.offsets[m], continued.offsets[m + 1]
        if at == stop:
            wordless += path * mass
            continue
        live[entries].at, live[entries].stop, live[entries].mass = at, stop, path * mass
        live[entries].row, live[entries].continued = row, base >= 0
        entries += 1
    if not gold_is_kept:
        rest = max(rest - on_path, 0.0)
        if base < 0 and spelling.offsets[token] < spelling.offsets[token + 1]:
            live[entries].at, live[entries].stop = spelling.offsets[token], spelling.offsets[token + 1]
            live[entries].mass, live[entries].row, live[entries].continued = 0.0, row, False
            entries += 1
    if row == 0 and agreeing < 1.0:  # what does not begin with the hidden space can't be
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


@numba.njit(cache=True, nogil=True)
@no_type_check
def _next(entry: ndarray, spelling: Spelling, continued: Continued) -> int:
    """The target token that an entry has next."""
    return continued.tokens[entry.at] if entry.continued else spelling.tokens[entry.at]


class _Ballot(NamedTuple):
    """The target ids that may come next, with their masses; the first is the one that comes."""

    ids: Int[ndarray, "candidates"]
    masses: Float[ndarray, "candidates"]
    kept: Int[ndarray, "candidates"]  # how many kept entries of one row vote for it
    order: Int[ndarray, "candidates"]  # the largest mass first
    slots: Int[ndarray, "slots"]  # an open-addressed table of candidates by id; -1 is free


@numba.njit(cache=True, nogil=True)
@no_type_check
def _new_ballot(most: int) -> _Ballot:
    slots = 64
    while slots < 2 * most:
        slots *= 2
    ids, kept, order = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
    return _Ballot(ids, np.empty(most), kept, order, np.full(slots, -1, np.int32))


@numba.njit(cache=True, nogil=True)
@no_type_check
def _slot(ballot: _Ballot, token: int) -> int:
    slot = (token * 0x9E3779B1 >> 7) & (len(ballot.slots) - 1)
    while ballot.slots[slot] >= 0 and ballot.ids[ballot.slots[slot]] != token:
        slot = (slot + 1) & (len(ballot.slots) - 1)
    return slot


@numba.njit(cache=True, nogil=True)
@no_type_check
def _sort(ballot: _Ballot, candidates: int) -> None:
    """By insertion: entries come sorted, and few of them meet."""
    for c in range(candidates):
        i = c
        while i > 0 and ballot.masses[ballot.order[i - 1]] < ballot.masses[c]:
            ballot.order[i] = ballot.order[i - 1]
            i -= 1
        ballot.order[i] = c


@numba.njit(cache=True, nogil=True)
@no_type_check
def _count_kept(tail: ndarray, live: ndarray, token: int, ballot: _Ballot, candidates: int, spelling: Spelling):
    """How many of the kept entries of a tail's row are still live, and how many of them go on beyond `token`; and into
    `ballot.kept`, how many vote for each id.
    """
    ballot.kept[:candidates] = 0
    count = beyond = 0
    for h in range(len(live)):
        if live[h].row == tail.row and not live[h].continued:
            count += 1
            next_token = spelling.tokens[live[h].at]
            candidate = ballot.slots[_slot(ballot, next_token)]
            if candidate >= 0:
                ballot.kept[candidate] += 1
            if next_token == token and live[h].at + 1 < live[h].stop:
                beyond += 1
    return count, beyond


@numba.njit(cache=True, nogil=True)
@no_type_check
def _share(node: int, per_id: float, ballot: _Ballot, candidates: int, spelling: Spelling, size: int) -> float:
    """Add a tail's share to the masses of the candidates: `per_id` for each id of the source that goes on with it after
    `node` and was not kept. Returns how much that was.
    """
    shared = 0.0
    for c in range(candidates):
        if node == 0:
            ids = spelling.ids_begun[ballot.ids[c]]
        else:
            child = _child(spelling, node, ballot.ids[c], size)
            ids = spelling.ids_below[child] if child >= 0 else 0
        mass = per_id * max(ids - ballot.kept[c], 0)
        ballot.masses[c] += mass
        shared += mass
    return shared


@numba.njit(cache=True, nogil=True)
@no_type_check
def _grown(array: ndarray, length: int) -> ndarray:
    result = np.empty(length, array.dtype)
    result[: len(array)] = array
    return result
