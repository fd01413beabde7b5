"""Join the bytes that tokens stand for, and find where each token begins in the text that they spell."""

from typing import no_type_check

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from fuselm.system.compiling import compiled


def find_starts(
    ids: Int[ndarray, "tokens"], offsets: Int[ndarray, "offsets"], packed: UInt8[ndarray, "bytes"], data: bytes
) -> Int[ndarray, "tokens"] | None:
    """Return the byte at which each token begins if their bytes join to `data`, or to a space and `data`; else None.

    With that space, the first token begins at -1. `packed` has the bytes of all ids, id i from `offsets[i]`.
    """
    starts = np.empty(len(ids), np.int32)
    return starts if _join(ids, offsets, packed, np.frombuffer(data, np.uint8), starts) else None


@no_type_check
@compiled(nogil=True)
def _join(ids, offsets, packed, data, starts):
    total = 0
    for id_ in ids:
        if id_ < 0 or id_ >= len(offsets) - 1:
            return False
        total += offsets[id_ + 1] - offsets[id_]
    if total - len(data) not in (0, 1):
        return False
    at = len(data) - total
    for n in range(len(ids)):
        starts[n] = at
        for byte in range(offsets[ids[n]], offsets[ids[n] + 1]):
            if packed[byte] != (data[at] if at >= 0 else 0x20):
                return False
            at += 1
    return True
