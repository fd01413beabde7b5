"""Predict each target token of a text by branches alone, without the source's rows that begin behind its beginning.

Rows of `branches` use the rows inside the token that came, which only the text's own branch has. That leaves their mean
right, but a loss on them would be too small. Here the text's own branch is treated like all others: what comes after
its last token is taken from the followers.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from fuselm.alignment.branch_splits import Splits
from fuselm.alignment.branch_votes import BRANCH, OUTSIDE, UNKNOWN, BranchRows, find_branches
from fuselm.alignment.continuation import lengthen
from fuselm.system.compiling import compiled

SPREAD = 1e-3  # of a prediction is spread over all ids, so that no loss is infinite


def predict_tokens(
    rows: BranchRows, target_ids: ndarray, target_begins: ndarray, splits: Splits, vocabulary_size: int
) -> Float[ndarray, "tokens"]:
    """Return the natural logs of what the branches give to each token; a token without text gets 0.

    The entries of `rows` must contain the tokens that came.
    """
    is_gold = rows.ids == np.repeat(rows.tokens, np.diff(rows.offsets))
    alone = rows._replace(
        tokens=np.full_like(rows.tokens, -1),
        offsets=np.arange(len(rows.tokens) + 1),
        ids=rows.ids[is_gold],
        masses=np.ones(len(rows.tokens)),
        tail=rows.gold,
        slots=rows.slots[is_gold],
        first_tokens=rows.first_tokens[is_gold],
    )
    others = find_branches(rows, target_ids, target_begins, splits)
    own = find_branches(alone, target_ids, target_begins, splits)
    given = _predict(rows, target_begins, *others[:2], *own[:2])
    return np.where(given < 0, 0.0, np.log((1 - SPREAD) * given.clip(0) + SPREAD / vocabulary_size))


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _predict(
    rows: BranchRows, target_begins: ndarray, begun: ndarray, others: ndarray, own_begun: ndarray, own: ndarray
) -> Float[ndarray, "tokens"]:
    """Return the probability of each token, or -1 for one without text."""
    count, row, path, alive = len(target_begins) - 1, 0, 1.0, 0
    result, live, before = np.full(count, -1.0), np.empty(256, BRANCH), 1.0
    for i in range(count):
        if target_begins[i] == target_begins[i + 1]:
            continue
        while row < len(rows.tokens) and (rows.begins[row] <= target_begins[i] or row == 0):
            most = alive + begun[row + 1] - begun[row]
            if most > len(live):
                live = lengthen(live, 2 * most)
            for b in range(begun[row], begun[row + 1]):
                live[alive] = others[b]
                live[alive].mass *= path
                alive += 1
            before, path, row = path, path * rows.gold[row], row + 1
        agreeing, known, kept = 0.0, 0.0, 0
        for h in range(alive):
            branch = live[h]
            if branch.place > i:
                agreeing += branch.mass
                live[kept] = branch
                kept += 1
            elif branch.place == i and branch.vote != UNKNOWN:
                known += branch.mass
        alive = kept
        for b in range(own_begun[row - 1], own_begun[row]):
            mass = before * rows.gold[row - 1] * own[b].mass
            if own[b].place > i:
                agreeing += mass
            elif own[b].place == i and own[b].vote != UNKNOWN and own[b].vote != OUTSIDE:
                known += mass
        result[i] = agreeing / (agreeing + known) if agreeing > 0.0 else 0.0
        total = path
        for h in range(alive):
            total += live[h].mass
        if total > 1e-300:
            path, before = path / total, before / total
            for h in range(alive):
                live[h].mass /= total
        else:
            path, before, alive = 1.0, 1.0, 0
    return result
