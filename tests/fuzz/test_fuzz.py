"""Run a few cases of every target of fuzz/: only right results and refusals, with bounds checks in compiled code.

The long run is by hand: `python -m tests.fuzz all --count 1500`.
"""

import os

import pytest
from fuzz import harness

CASES = {"kernels": 30, "store_values": 10, "index_manifest": 10, "store_bytes": 20, "gguf": 200}


@pytest.mark.parametrize("target", harness.TARGETS)
def test_nonsense_is_refused_or_read_right(target):
    count = CASES.get(target, 25)
    tally = harness.run(target, 0, count, environment=os.environ)
    assert not tally.failures, tally.failures
    assert tally.outcomes.total() == count and tally.outcomes["refused"] > 0, tally.outcomes


BROKEN = """
import ctypes

def prepare(folder):
    return [lambda: None, lambda: 1 / 0, lambda: int("no"), lambda: ctypes.string_at(0)]

def case(made, random, folder):
    made.pop(0)()
"""


def test_a_crash_and_a_traceback_are_reported_with_their_seeds():
    path = harness.HERE / "targets" / "broken_for_a_test.py"
    path.write_text(BROKEN)
    try:
        command = {"PYTHONDONTWRITEBYTECODE": "1", **os.environ}
        tally = harness.run("broken_for_a_test", 7, 4, environment=command)
    finally:
        path.unlink()
    assert tally.outcomes == {"correct": 1, "failure": 1, "refused": 1, "crash": 1}
    assert tally.failures[0].startswith("--seed 8: ZeroDivisionError: division by zero at broken_for_a_test.py:")
    assert tally.failures[1].startswith("--seed 10: ended with -11")
