"""Questions of reasoning-gym are the same ones each time, and the package judges their answers."""

import sys

import pytest
from tiny_run import QUIET

from fuselm.models.locating import locate_model
from fuselm.results.tasks import asking, catalogue
from fuselm.results.tasks.suites import reasoning

LIMIT = 2


@pytest.fixture(autouse=True)
def forget_tasks():
    """Forget tasks and scorers that were found with another package."""
    yield
    catalogue._find_tasks.cache_clear()
    reasoning._find_scorer.cache_clear()


def test_a_missing_package_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError) as told:
        catalogue.find_tasks(["reasoning_gym_gcd"])
    expected = "evaluate.tasks: reasoning_gym_gcd: needs the package reasoning_gym; run: pip install reasoning-gym"
    assert str(told.value) == expected


def test_every_kind_has_a_task_file():
    files = {path.stem for path in catalogue.SUITES.glob("reasoning_gym_*.yaml")}
    assert files == {f"reasoning_gym_{kind}" for kind in [*reasoning.KINDS, "shared"]}


def test_questions_are_different_ones_and_the_same_each_time():
    pytest.importorskip("reasoning_gym")
    found = catalogue.find_tasks(["reasoning_gym"])
    assert found.members["reasoning_gym"] == tuple(f"reasoning_gym_{kind}" for kind in reasoning.KINDS)
    assert found.by_size == {"reasoning_gym": True}
    for task in found.tasks.values():
        asked = [row["question"] for row in [*task.fewshot_docs(), *task.eval_docs]]
        assert len(set(asked)) == len(asked) == reasoning.EXAMPLES + reasoning.QUESTIONS
    catalogue._find_tasks.cache_clear()
    assert catalogue.find_tasks(["reasoning_gym"]).hashes == found.hashes
    assert catalogue.find_tasks(["reasoning_gym"], num_fewshot=2).hashes != found.hashes
    with pytest.raises(ValueError, match=r"num_fewshot: reasoning_gym_gcd has 16 examples \(got 17\); ask for fewer"):
        catalogue.find_tasks(["reasoning_gym_gcd"], num_fewshot=17)


@pytest.mark.parametrize("kind", reasoning.KINDS)
def test_right_answers_are_right_and_others_are_not(kind):
    pytest.importorskip("reasoning_gym")
    rows = reasoning.draw_questions(kind)
    for row in rows:
        assert len(row["answer"]) <= 16
        for text in (f" {row['answer']}", f"\n{row['answer']}.\nNext", f"So <answer>{row['answer']}</answer>"):
            assert reasoning.judge_answer(row, [text]) == {"acc": 1.0}
        for text in ("", "\n", f"{row['answer']} or so", f"{row['answer']}9"):
            assert reasoning.judge_answer(row, [text]) == {"acc": 0.0}


def test_a_model_is_asked_after_four_examples(byte_level):
    pytest.importorskip("reasoning_gym")
    found = catalogue.find_tasks(["reasoning_gym_gcd", "reasoning_gym_spell_backward"], limit=LIMIT)
    options = {"dtype": "float32", "batch_tokens": 300, "limit": LIMIT, "chat_template": False, "run_code": False}
    rows, numbers = asking.ask_model(locate_model(byte_level), found.tasks, progress=QUIET, **options)
    assert len(rows) == 2 * LIMIT and {row["value"] for row in rows} <= {0.0, 1.0}
    assert {row["document"] for row in rows} >= {"gcd 16", "gcd 17"}
    for name, task in found.tasks.items():
        assert numbers[name]["questions"] == LIMIT and numbers[name]["num_fewshot"] == 4
        (prompt, _) = task.instances[0].args
        assert prompt.count("Question: ") == 5 and prompt.endswith("\nAnswer:")
        for row in list(task.fewshot_docs())[:4]:
            assert f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" in prompt
