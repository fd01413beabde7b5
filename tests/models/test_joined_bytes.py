"""Compare joined_bytes.py with joining byte strings in Python."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fuselm.models import joined_bytes

SPELLED = [b"a", b"", b" a", b"\xc3", b"\xa9b", b" "]
PACKED = np.cumsum([0, *map(len, SPELLED)]), np.frombuffer(b"".join(SPELLED), np.uint8)


@given(
    ids=st.lists(st.integers(0, len(SPELLED) - 1), max_size=5), begin=st.integers(0, 2), more=st.sampled_from("| |b")
)
def test_starts_are_those_of_joined_strings(ids, begin, more):
    strings = [SPELLED[i] for i in ids]
    data = b"".join(strings)[begin:] + more.strip("|").encode()
    found = joined_bytes.find_starts(np.array(ids, np.int32), *PACKED, data)
    if b"".join(strings) not in (data, b" " + data):
        assert found is None
        return
    first = len(data) - len(b"".join(strings))
    assert found.tolist() == [*itertools.accumulate(map(len, strings[:-1]), initial=first)][: len(ids)]
    assert found.dtype == np.int32


def test_ids_that_are_not_in_the_vocabulary_spell_nothing():
    assert joined_bytes.find_starts(np.array([0, len(SPELLED)], np.int32), *PACKED, b"aa") is None
    assert joined_bytes.find_starts(np.array([-1], np.int32), *PACKED, b" ") is None
