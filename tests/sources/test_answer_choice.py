"""answer_choice.py: how each way to choose gives answers numbers, and what it says of a function that fails."""

import math

import numpy as np
import pytest

from fuselm.models.chat.messages import Dialogue, Message
from fuselm.sources import answer_choice
from fuselm.sources.answer_choice import Answers


def ask(*answers: str) -> Answers:
    messages = [
        Message(role="user", content="1 + 1?"),
        Message(role="assistant", content="2"),
        Message(role="user", content="2 + 2?"),
        Message(role="assistant", content="4"),
    ]
    return Answers(reference=Dialogue(messages=tuple(messages)), domain="sums", answers=answers)


def test_an_answer_is_put_in_place_of_the_last_one_and_all_before_it_is_context():
    dialogue = ask().put_in("5")
    assert [m.content for m in dialogue.messages] == ["1 + 1?", "2", "2 + 2?", "5"]
    assert dialogue.encode() == b"5\xff"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("4", "4"),
        (" Four.\n", "four"),
        ("2 and 2 make 4.\nThe answer is **4**.", "4"),
        ("Answer: 4", "4"),
        ("So \\boxed{3}, no, \\boxed{4}; the answer is 5", "4"),
        ("", ""),
    ],
)
def test_what_an_answer_says_in_short(text, short):
    assert answer_choice.extract_answer(text) == short


def test_the_majority_counts_what_answers_say_in_short():
    numbers = answer_choice.choose_by_majority([ask("4", "The answer is 4.", "5"), ask()])
    assert numbers == [[2 / 3, 2 / 3, 1 / 3], []]


def test_the_mixture_is_that_of_probabilities():
    probabilities = np.array([[0.5, 0.01], [0.1, 0.01]])
    found = answer_choice.mix_scores(-np.log(probabilities), [2, 4])
    np.testing.assert_allclose(found, [math.log(0.3) / 2, math.log(0.01) / 4])


def test_a_function_gets_the_answer_and_the_row_of_the_conversation(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def right(answer, row):\n    return answer == row['messages'][-1]['content'] and row['domain'] == 'sums'"
    )
    assert answer_choice.choose_by_function(f"{file}:right")([ask("4", "5")]) == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        ("x = 1", "mine.py:best", "has no function 'best'"),
        ("1 / 0", "mine.py:best", "fails: ZeroDivisionError"),
        ("def best(answer, row): return row['none']", "mine.py:best", "fails for the answer '4': KeyError"),
        ("def best(answer, row): return float('nan')", "mine.py:best", "gives NaN for the answer '4'"),
        ("", "other.py:best", "no file"),
        ("", "best", "take one of mixture, majority, or write FILE.py:FUNCTION"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(tmp_path, monkeypatch, code, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=r"write\.choose: ") as error:
        answer_choice.choose_by_function(name)([ask("4")])
    assert said in str(error.value) and "\n" not in str(error.value)
