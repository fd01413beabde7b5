"""Run fuzz/targets/server_answers.py for a bounded time, and prove that it finds missing checks."""

import random
from collections import Counter

import pytest
from fuzz.targets import server_answers

from fuselm.sources.servers import id_protocols, prompt_logprobs

CASES = 1500


def run(cases: int) -> Counter:
    outcomes: Counter = Counter()
    for seed in range(cases):
        case = server_answers.make_case(random.Random(seed))
        try:
            server_answers.check_case(case)
        except ValueError:
            outcomes[case.kind, "refused"] += 1
        else:
            outcomes[case.kind, "read"] += 1
    return outcomes


def test_every_mutated_answer_is_read_right_or_refused():
    outcomes = run(CASES)
    assert sum(outcomes.values()) == CASES
    assert all(outcomes[kind, how] > CASES // 30 for kind in server_answers.KINDS for how in ("read", "refused"))


@pytest.mark.parametrize(
    "module, name, instead",
    [
        (id_protocols, "make_entries", lambda ids, logprobs: list(zip(ids, logprobs, strict=True))),
        (prompt_logprobs, "check_row", lambda *_: None),
        (prompt_logprobs, "check_numbers", lambda _: None),
    ],
)
def test_a_missing_check_is_found(monkeypatch, module, name, instead):
    monkeypatch.setattr(module, name, instead)
    with pytest.raises((AssertionError, TypeError, OverflowError)):
        run(2 * CASES)
