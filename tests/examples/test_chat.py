"""examples/chat: conversations that a run reads as they are, and questions that are counted when answered exactly."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import chat_models
import numpy as np
import pytest
import tiny_run

from fuselm.documents.texts import read_texts
from fuselm.models.chat.messages import Dialogue
from fuselm.sources.answering import PAIRS_FILE

CHAT = Path(__file__).parents[2] / "examples" / "chat"
ROWS = [json.loads(line) for line in (CHAT / "conversations.jsonl").read_text(encoding="utf-8").splitlines()]
QUESTIONS = [json.loads(line) for line in (CHAT / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def load(name: str) -> ModuleType:
    """Load a script of the example with the modules of its own folders, whatever other tests have imported."""
    specification = importlib.util.spec_from_file_location(f"chat_{name}", CHAT / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        for short in ("run", "items", "results"):
            patch.delitem(sys.modules, short, raising=False)
        patch.setattr(sys, "path", list(sys.path))
        specification.loader.exec_module(module)
        for short in ("run", "items", "results"):
            sys.modules.pop(short, None)
    return module


exact_match, build, choose, prefer = map(load, ("exact_match", "build", "choose", "prefer"))


def answers_of(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def test_files_are_small_and_every_row_is_read_as_a_conversation():
    assert sum((CHAT / name).stat().st_size for name in ("conversations.jsonl", "questions.jsonl")) < 1_000_000
    read = list(read_texts(CHAT / "conversations.jsonl", "chat", {}))
    assert [(row.domain, row.split) for row in read] == [(row["domain"], row["split"]) for row in ROWS]
    assert all(isinstance(row.text, Dialogue) for row in read)
    assert {len(answers_of(row)) for row in ROWS} == {1, 2, 3}
    assert any(row["messages"][0]["role"] == "system" for row in ROWS)
    assert all(row["license"] and row["source"] for row in ROWS + QUESTIONS)


def test_a_source_is_in_one_split():
    splits: dict[str, set[str]] = {}
    for row in ROWS:
        splits.setdefault(row["source"], set()).add(row["split"])
    assert all(len(of) == 1 for of in splits.values())


def test_languages_take_different_pages():
    pages = [
        {r["source"].split("/text/")[1] for r in ROWS if r["domain"] == d} for d in ("english", "french", "german")
    ]
    assert not pages[0] & pages[1] and not pages[0] & pages[2] and not pages[1] & pages[2]


def test_no_question_of_reasoning_is_asked_twice():
    asked = [m["content"] for r in ROWS if r["domain"] == "reasoning" for m in r["messages"] if m["role"] == "user"]
    asked = [question.removesuffix(f"\n{build.ANSWER_ONLY}") for question in asked]
    asked += [question["question"].removesuffix(f"\n{build.ANSWER_ONLY}") for question in QUESTIONS]
    assert len(set(asked)) == len(asked)
    assert len(QUESTIONS) == 50 * len(build.TASKS)


def test_answers_have_the_size_that_the_readme_says():
    sizes = [len(a.encode()) for row in ROWS if row["domain"] != "reasoning" for a in answers_of(row)]
    assert min(sizes) >= 100 and max(sizes) <= 600


def test_a_section_is_its_paragraphs_and_numbered_steps_up_to_the_first_table():
    page = build.HelpPage(
        "<h1>Moving<br>Things</h1><p>First <b>bold</b> words.</p><ol><li><p>Do this.</p></li><li><p>Then that.</p></li>"
        "</ol><p>Last.</p><table><tr><td><p>Cell.</p></td></tr></table><p>After the table.</p><h2>Next</h2><p>More.</p>"
    )
    assert page.sections == [
        ("Moving Things", ["First bold words.", "1. Do this.", "2. Then that.", "Last."]),
        ("Next", ["More."]),
    ]


def test_a_function_is_asked_by_signature_and_docstring_and_answered_by_the_rest():
    body = "    value = thing + 1\n" * 6
    code = f'class A:\n    def f(self, thing):\n        """Return it."""\n{body.replace("    v", "        v")}\n'
    [turn] = build.python_turns(code, "m", build.random.Random(0))
    assert turn.prompt.endswith('def f(self, thing):\n    """Return it."""')
    assert turn.answer == "\n".join(["value = thing + 1"] * 6)


@pytest.mark.parametrize(
    ("given", "right"), [(" yes.\n", True), ("Yes", True), ("Yes, it does", False), ("", False), ("No", False)]
)
def test_an_answer_is_right_up_to_space_case_and_a_full_stop(given, right):
    assert (exact_match.normalize(given) == exact_match.normalize("Yes")) is right


def test_summary_counts_by_task_and_compares_the_same_questions():
    questions = [{"task": t, "answer": f"{n}"} for t in "ab" for n in range(20)]
    wrong, half = ["x"] * 40, [f"{n}" for n in range(20)] + ["x"] * 20
    summary = exact_match.summarize(questions, [{"base": wrong, "clm": half, "fused": half}])
    assert summary["right"]["clm"] == {"a": 1, "b": 0, "all": 0.5}
    assert summary["differences"]["fused-clm"]["all"] == {"value": 0, "low": 0, "high": 0}
    gained = summary["differences"]["fused-base"]
    assert gained["all"] == {"value": 0.5, "low": 0.5, "high": 0.5}  # drawn within each task
    assert [gained[task]["value"] for task in "ab"] == [1, 0]
    assert "fused-base: +50.0 [+50.0, +50.0]" in exact_match.render_table(summary)


def test_several_runs_are_compared_over_seeds_and_questions():
    questions = [{"task": t, "answer": f"{n}"} for t in "ab" for n in range(20)]
    right, some = [f"{n}" for n in range(20)] * 2, [f"{n}" for n in range(20)] + ["x"] * 20
    runs = [{"clm": some, "fused": right}, {"clm": some, "fused": some}, {"clm": right, "fused": right}]
    summary = exact_match.summarize(questions, runs)
    found = summary["differences"]["fused-clm"]["all"]
    assert found["by_run"] == [0.5, 0, 0] and found["value"] == pytest.approx(1 / 6)
    reach = 4.302653 * np.std([0.5, 0, 0], ddof=1) / 3**0.5  # Student's t of two degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx((1 / 6 - reach, 1 / 6 + reach), abs=1e-4)
    assert summary["right"]["fused"]["all"] == pytest.approx(5 / 6)
    assert "; by run +50.0, +0.0, +0.0" in exact_match.render_table(summary)


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert exact_match.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no finished run there")


@pytest.fixture(scope="module")
def finished(byte_level, sentence_piece, tmp_path_factory) -> Path:
    """Fuse tiny models over some conversations of each domain and split; return the run's folder."""
    folder = tmp_path_factory.mktemp("chat")
    target = chat_models.add_template(byte_level, folder / "target")
    other = chat_models.add_template(sentence_piece, folder / "other", chat_models.BRACKETS)
    counts: dict[tuple[str, str], int] = {}
    rows = []
    for row in ROWS:
        key = row["domain"], row["split"]
        if row["domain"] in ("french", "reasoning") and row["messages"][0]["role"] != "system":
            counts[key] = counts.get(key, 0) + 1
            if counts[key] <= 3:
                rows.append(row)
    file = tiny_run.write(folder, target=target, sources={"other": other}, rows=rows)
    outcome = tiny_run.fuselm("run", file)
    assert outcome.code == 0, outcome.err
    return folder / "out"


def test_models_of_a_run_are_asked_in_their_own_templates(finished, tmp_path, capsys):
    arguments = [str(finished), "--models", "base,other,clm,fused", "--limit", "2"]
    assert exact_match.main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["questions"] == 2 * len(build.TASKS)
    assert set(summary["right"]) == {"base", "other", "clm", "fused"}
    assert set(summary["differences"]) == {"fused-clm", "fused-base", "clm-base"}
    kept = sorted((finished / "exact_match").iterdir())
    assert exact_match.main([*arguments, "--batch", "3"]) == 0
    assert sorted((finished / "exact_match").iterdir()) == kept  # not asked again
    assert "| exactly right, % | other | base | clm | fused | fused - clm |" in capsys.readouterr().out
    (again := tmp_path / "again").mkdir()
    for name in ("run.json", "config.yaml"):
        (again / name).write_bytes((finished / name).read_bytes())
    (again / "train").symlink_to(finished / "train")
    assert exact_match.main([str(finished), str(again), *arguments[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"]["fused-clm"]["all"]["by_run"] == [0, 0]
    assert not (again / "exact_match").exists()  # the same models, asked before


def test_answers_are_the_same_one_by_one_and_together(finished):
    [(model, dtype)] = exact_match.find_models(finished, ["fused"]).values()
    prompts = [question["question"] for question in QUESTIONS[::83]]
    alone = exact_match.ask(model, prompts, dtype=dtype, batch=1)
    assert exact_match.ask(model, prompts, dtype=dtype, batch=5) == alone


def test_a_model_without_a_template_is_named(byte_level):
    model = exact_match.locate_model(str(byte_level))
    with pytest.raises(ValueError, match="has no chat template"):
        exact_match.ask(model, ["Hello?"], dtype="auto", batch=1)


def test_the_closest_answer_is_that_of_the_corpus():
    row = {"messages": [{"role": "assistant", "content": "Yes"}], "domain": "reasoning"}
    assert [choose.closest(answer, row) for answer in (" yes.", "No")] == [1, 0]
    code = {"messages": [{"role": "assistant", "content": "return a + b"}], "domain": "python"}
    assert choose.closest("return a", code) > choose.closest("pass", code)


@pytest.fixture
def answered(finished, tmp_path) -> Path:
    """Return a finished run of which a source has answered three questions."""
    folder = tmp_path / "run"
    (folder / "answers").mkdir(parents=True)
    (folder / "model").symlink_to(finished / "model")
    said = {kind: [{"role": "assistant", "content": kind}] for kind in ("chosen", "rejected")}
    pair = {"prompt": [{"role": "user", "content": "Which?"}], **said, "domain": "a"}
    (folder / "answers" / PAIRS_FILE).write_text((json.dumps(pair) + "\n") * 3)
    (folder / "run.json").write_text(json.dumps({"folders": {"write other+answers": "answers"}}))
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_run_learns_to_prefer_the_best_answers(answered, capsys):
    pytest.importorskip("trl")
    assert prefer.main([str(answered), "--rate", "0.01", "--passes", "3"]) == 0
    found = json.loads((answered / "preferred.json").read_text())
    assert found["pairs"] == 3 and found["margin before"] == 0 < found["margin after"]
    assert found["loss after"] < found["loss before"]
    assert "chat_template" in "".join(path.read_text() for path in (answered / "preferred").glob("*.json")) or list(
        (answered / "preferred").glob("chat_template*")
    )


def test_a_run_in_which_no_source_answered_is_one_line(finished, tmp_path, capsys):
    for folder, said in ((finished, "no source answered there"), (tmp_path, "no finished run there")):
        assert prefer.main([str(folder)]) == 2
        assert f"error: {folder}: {said}" in capsys.readouterr().err
