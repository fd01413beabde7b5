"""Sum the mass of each token that may come next, in an open-addressed table; span.py uses it."""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from fuselm.system.compiling import compiled


class NextTokens(NamedTuple):
    """Hold the target ids that may come next, with their masses; the first id is the token that comes."""

    ids: Int[ndarray, "candidates"]
    masses: Float[ndarray, "candidates"]
    kept: Int[ndarray, "candidates"]  # the number of a row's kept entries that vote for it
    order: Int[ndarray, "candidates"]  # candidates, from the largest mass to the least
    slots: Int[ndarray, "slots"]  # an open-addressed table of candidates by id; -1 marks a free slot


@compiled(nogil=True)
@no_type_check
def new_next_tokens(most: int) -> NextTokens:
    """Return an empty table with room for `most` candidates."""
    slots = 64
    while slots < 2 * most:
        slots *= 2
    ids, kept, order = np.empty(most + 1, np.int32), np.empty(most + 1, np.int32), np.empty(most + 1, np.int32)
    return NextTokens(ids, np.empty(most + 1), kept, order, np.full(slots, -1, np.int32))


@compiled(nogil=True)
@no_type_check
def find_slot(table: NextTokens, token: int) -> int:
    """Return the slot of a token, or the free slot where it belongs."""
    slot = (token * 0x9E3779B1 >> 7) & (len(table.slots) - 1)
    while table.slots[slot] >= 0 and table.ids[table.slots[slot]] != token:
        slot = (slot + 1) & (len(table.slots) - 1)
    return slot


@compiled(nogil=True)
@no_type_check
def sort_by_mass(table: NextTokens, candidates: int) -> None:
    """Order the candidates by mass, the largest first. Entries come nearly sorted, so insertion is quick."""
    for c in range(candidates):
        i = c
        while i > 0 and table.masses[table.order[i - 1]] < table.masses[c]:
            table.order[i] = table.order[i - 1]
            i -= 1
        table.order[i] = c
