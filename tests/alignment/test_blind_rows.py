"""Check that predictions by branches alone are the source's own if they can be, and use no row behind their token."""

from dataclasses import replace

import enumeration
import numpy as np
import pytest

from fuselm.alignment.aligner import Aligner
from fuselm.alignment.blind_rows import SPREAD

LETTERS, AB = enumeration.vocabulary([]), enumeration.vocabulary([("a", "b")])
ROWS = [{"a": 0.6, "b": 0.4}, {"a": 0.3, "b": 0.7}, {"a": 0.2, "c": 0.8}, {"a": 0.5, "c": 0.5}]


def predict(target, rows, texts):
    text = "abca"
    by_id = [{LETTERS.id_by_bytes[c.encode()]: p for c, p in row.items()} for row in rows]
    trace = enumeration.trace_of(LETTERS.segment(text), by_id)
    trace = replace(trace, distributions=replace(trace.distributions, tail=np.zeros(len(rows), np.float32)))
    aligner = Aligner(LETTERS, target, method="branches", texts=texts)
    return np.exp(aligner.branches.predict_tokens(trace, target.segment(text), text.encode()))


def test_a_source_of_the_same_tokens_predicts_what_its_rows_say():
    spread = SPREAD / LETTERS.size
    assert predict(LETTERS, ROWS, ["abc" * 20]) == pytest.approx(
        [(1 - SPREAD) * p + spread for p in (0.6, 0.7, 0.8, 0.5)], rel=1e-4
    )


def test_a_token_is_predicted_without_the_rows_inside_it():
    texts = ["abacab" * 20]
    first = predict(AB, ROWS, texts)
    changed = predict(AB, [ROWS[0], {"a": 0.9, "b": 0.1}, *ROWS[2:]], texts)
    assert first[0] == pytest.approx(changed[0])  # `ab`, which the source writes in two tokens
    assert 0.6 * 0.5 < first[0] < 0.6 * 0.85  # two of three a's are followed by b
