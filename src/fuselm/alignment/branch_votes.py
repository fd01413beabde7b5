"""Sum what the branches of a source's rows say of each target token; branches.py uses this, compiled."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.alignment.branch_splits import Splits
from fuselm.alignment.continuation import lengthen
from fuselm.alignment.next_tokens import NextTokens, find_slot, new_next_tokens, sort_by_mass
from fuselm.system.compiling import compiled

UNKNOWN, OUTSIDE = -1, -2  # in place of a vote: nothing is known from here on; an id that the row does not keep
# A branch has the target's tokens of the text up to `place`, where it votes for another one.
BRANCH = np.dtype([("mass", "f8"), ("place", "i4"), ("vote", "i4")])


class BranchRows(NamedTuple):
    """Hold a source's rows, whose entries are to be compared with the target's tokens of a text.

    `within` is the target token that a row begins in or with. `slots` says where each entry is in the splits, or -1 if
    it has no text, and `first_tokens` with which target token they begin.
    """

    tokens: Int[ndarray, "rows"]
    begins: Int[ndarray, "rows"]
    within: Int[ndarray, "rows"]
    offsets: Int[ndarray, "rows+1"]
    ids: Int[ndarray, "entries"]
    masses: Float[ndarray, "entries"]
    gold: Float[ndarray, "rows"]
    tail: Float[ndarray, "rows"]
    slots: Int[ndarray, "entries"]
    first_tokens: Int[ndarray, "entries"]


class _Sums(NamedTuple):
    """Sum the masses of branches at one token, by what becomes of them."""

    agreeing: float  # have the token that came
    unknown: float
    later: float  # vote here, although their row begins behind the token: they make it longer


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def sum_votes(
    rows: BranchRows, target_ids: ndarray, target_begins: ndarray, splits: Splits, top_k: int
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Return the offsets, ids, masses and tails of the target's rows."""
    count, filled = len(target_ids), 0
    begun, branches, last_row = find_branches(rows, target_ids, target_begins, splits)
    offsets, tail = np.zeros(count + 1, np.int64), np.ones(count, np.float32)
    ids, masses = np.empty(16 * count + 16, np.int32), np.empty(16 * count + 16)
    # `path` is the mass of the text's own branch; with that of the live ones it sums to 1
    path, row, live, alive, table = 1.0, 0, np.empty(256, BRANCH), 0, new_next_tokens(256)
    for i in range(count):
        offsets[i + 1] = filled
        if target_begins[i] == target_begins[i + 1]:
            continue
        inside = row  # rows before this one begin in the token or before it
        while inside < len(rows.tokens) and (rows.begins[inside] < target_begins[i + 1] or inside == 0):
            inside += 1
        stop = max(inside, last_row[i] + 1)
        most = alive + begun[stop] - begun[row] + 1
        if most > len(live):
            live = lengthen(live, 2 * most)
            table = new_next_tokens(2 * most)
        total = path + live[:alive].mass.sum()
        table.ids[0], table.masses[0] = target_ids[i], 0.0
        table.slots[find_slot(table, target_ids[i])] = 0
        candidates, alive, sums = _count(table, 1, live, 0, live[:alive], i, 1.0, False, _Sums(0.0, 0.0, 0.0))
        on_path = path
        for r in range(row, stop):
            leaving = branches[begun[r] : begun[r + 1]]
            candidates, alive, sums = _count(table, candidates, live, alive, leaving, i, path, r >= inside, sums)
            path *= rows.gold[r]
            if r < inside:
                on_path = path
        row = stop
        table.masses[0] = max(sums.agreeing + on_path - sums.later, 1e-12 * total)
        # A row of draws may lack the token that came, and then sums to more
        known = max(total - sums.unknown, table.masses[:candidates].sum())
        sort_by_mass(table, candidates)
        if filled + candidates > len(ids):
            ids, masses = lengthen(ids, 2 * (filled + candidates)), lengthen(masses, 2 * (filled + candidates))
        kept = 0.0
        for rank in range(min(candidates, top_k)):
            mass = table.masses[table.order[rank]] / known
            if mass > 0.0:
                ids[filled], masses[filled] = table.ids[table.order[rank]], mass
                kept += mass
                filled += 1
        table.slots[:] = -1
        offsets[i + 1] = filled
        tail[i] = min(max(1.0 - kept, 0.0), 1.0)
        remaining = path + live[:alive].mass.sum()
        if remaining < 1e-300:  # too small for a float
            path, alive = 1.0, 0
            continue
        path /= remaining
        for h in range(alive):
            live[h].mass /= remaining
    return offsets, ids[:filled].copy(), masses[:filled].copy(), tail


@compiled(nogil=True)
@no_type_check
def _count(
    table: NextTokens,
    candidates: int,
    live: ndarray,
    alive: int,
    branches: ndarray,
    i: int,
    scale: float,
    is_later: bool,
    sums: _Sums,
) -> tuple[int, int, _Sums]:
    """Let branches vote at token i, and put those that agree with it behind the first `alive` of `live`.

    `scale` multiplies their masses. `is_later` says that their row begins behind the token.
    """
    agreeing, unknown, later = sums.agreeing, sums.unknown, sums.later
    for branch in branches:
        mass, place, vote = scale * branch.mass, branch.place, branch.vote
        if place > i:
            agreeing += 0.0 if is_later else mass
            live[alive].mass, live[alive].place, live[alive].vote = mass, place, vote
            alive += 1
        elif place < i or vote == UNKNOWN:
            unknown += 0.0 if is_later else mass
        elif vote != OUTSIDE:
            slot = find_slot(table, vote)
            if table.slots[slot] < 0:
                table.ids[candidates], table.masses[candidates], table.slots[slot] = vote, 0.0, candidates
                candidates += 1
            table.masses[table.slots[slot]] += mass
            later += mass if is_later else 0.0
    return candidates, alive, _Sums(agreeing, unknown, later)


@compiled(nogil=True)
@no_type_check
def find_branches(
    rows: BranchRows, target_ids: ndarray, target_begins: ndarray, splits: Splits
) -> tuple[ndarray, ndarray, ndarray]:
    """Return each row's range of branches, the branches, and for each target token the last row that votes there."""
    begun, branches, filled = np.zeros(len(rows.tokens) + 1, np.int64), np.empty(8 * len(rows.ids) + 64, BRANCH), 0
    last_row = np.full(len(target_ids), -1, np.int64)
    for r in range(len(rows.tokens)):
        rest, gold_is_kept = rows.tail[r], False
        for e in range(rows.offsets[r], rows.offsets[r + 1]):
            if rows.ids[e] == rows.tokens[r]:
                gold_is_kept = True
                continue
            slot, own = rows.slots[e], filled
            if slot < 0:
                branches, filled = _add(branches, own, filled, rows.masses[e], rows.within[r], UNKNOWN)
                continue
            begin = rows.first_tokens[e]
            while begin < len(target_ids) and target_begins[begin] == target_begins[begin + 1]:
                begin += 1
            s, stop = splits.first[slot], splits.first[slot + 1]
            while s < stop:
                at = splits.token_first[s]
                token = splits.tokens[at] if at < splits.token_first[s + 1] else -1
                if token >= 0 and begin < len(target_ids) and token != target_ids[begin] and splits.alike[s] > 0:
                    branches, filled = _add(branches, own, filled, rows.masses[e] * splits.sums[s], begin, token)
                    s += splits.alike[s]
                    continue
                place, vote = _compare(
                    splits.tokens[splits.token_first[s] : splits.token_first[s + 1]],
                    target_ids,
                    target_begins,
                    begin,
                )
                if vote != UNKNOWN or place == len(target_ids) or splits.next_first[s] == splits.next_stop[s]:
                    mass = rows.masses[e] * splits.weights[s]
                    branches, filled = _add(branches, own, filled, mass, place, vote)
                    s += 1
                    continue
                following = place
                while following < len(target_ids) and target_begins[following] == target_begins[following + 1]:
                    following += 1
                for n in range(splits.next_first[s], splits.next_stop[s]):
                    token, mass = splits.next_tokens[n], rows.masses[e] * splits.next_weights[n]
                    if token < 0 or following == len(target_ids):
                        branches, filled = _add(branches, own, filled, mass, place if token < 0 else following, UNKNOWN)
                    elif token == target_ids[following]:
                        branches, filled = _add(branches, own, filled, mass, following + 1, UNKNOWN)
                    else:
                        branches, filled = _add(branches, own, filled, mass, following, token)
                s += 1
            for b in range(own, filled):
                if branches[b].vote != UNKNOWN:
                    last_row[branches[b].place] = max(last_row[branches[b].place], r)
        if not gold_is_kept:
            rest -= rows.gold[r]
        if rest > 0.0:
            branches, filled = _add(branches, filled, filled, rest, rows.within[r], OUTSIDE)
        begun[r + 1] = filled
    return begun, branches[:filled], last_row


@compiled(nogil=True)
@no_type_check
def _add(branches: ndarray, own: int, filled: int, mass: float, place: int, vote: int) -> tuple[ndarray, int]:
    """Add a branch to those of its entry, which begin at `own`, or its mass to one that votes alike."""
    for b in range(own, filled):
        if branches[b].place == place and branches[b].vote == vote:
            branches[b].mass += mass
            return branches, filled
    if filled == len(branches):
        branches = lengthen(branches, 2 * filled)
    branches[filled].mass, branches[filled].place, branches[filled].vote = mass, place, vote
    return branches, filled + 1


@compiled(nogil=True)
@no_type_check
def _compare(tokens: ndarray, target_ids: ndarray, target_begins: ndarray, first: int) -> tuple[int, int]:
    """Return where `tokens` first differ from the target's from `first` on, and the other token, or `UNKNOWN`."""
    i = first
    for token in tokens:
        while i < len(target_ids) and target_begins[i] == target_begins[i + 1]:
            i += 1
        if i == len(target_ids):
            return i, UNKNOWN
        if token != target_ids[i]:
            return i, token
        i += 1
    return i, UNKNOWN
