"""Test written.py: how much of held-out text is in what sources wrote."""

import pytest
import written

HELDOUT = ["One two three four five six seven eight nine.", "a b c d e f g h"]


def test_shares_count_runs_of_eight_words_without_case_and_punctuation():
    made = ["x, ONE two three -- four five six seven eight! then b c d e"]
    found = written.compare_texts(HELDOUT, ["A b c d E f g h i"], made)
    assert found["heldout_runs"] == 3 and found["written_words"] == 14
    assert found["in_written"] == pytest.approx(1 / 3) and found["in_train"] == pytest.approx(1 / 3)
    assert found["documents"] == 1
    assert (found["longest_words"], found["longest"]) == (8, "one two three four five six seven eight")


def test_texts_that_share_nothing():
    found = written.compare_texts(HELDOUT, [], ["nothing of it", ""])
    assert (found["in_written"], found["in_train"], found["documents"], found["longest"]) == (0.0, 0.0, 0, "")


def test_a_run_that_wrote_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file|does not exist|cannot"):
        written.compare_run(tmp_path / "nothing")
