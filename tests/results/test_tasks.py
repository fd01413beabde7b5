"""Tasks of lm-eval: the answers are lm-eval's own, differences are paired, and what cannot be asked is told."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import QUIET

from fuselm.models.forward import OutputLayer
from fuselm.models.locating import locate_model
from fuselm.results.tasks import answers, asking, catalogue, choices
from fuselm.results.tasks.answers import TaskAnswers
from fuselm.results.tasks.comparison import compare_models, compute_mcnemar_p, judge_difference
from fuselm.results.tasks.reading import cut_input, keep_apart, score_tokens

LIMIT = 7
TASKS = ("minimal_pairs_french", "copying_words", "copying_numbers")


def ask(model, names, **options):
    found = catalogue.find_tasks(list(names), limit=LIMIT)
    given = {"dtype": "float32", "batch_tokens": 300, "limit": LIMIT, "chat_template": False, "run_code": False}
    return asking.ask_model(locate_model(model), found.tasks, progress=QUIET, **given | options)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    """Tasks of a user: one of each kind of output that lm-eval has."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"The {n} ships sail far away.", "answer": f"{n}"} for n in range(11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    (folder / "sizes.yaml").write_text(
        f"task: rolled\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n{shared}"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    (folder / "written.yaml").write_text(
        f"task: written\noutput_type: generate_until\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: answer\n{shared}"
        "generation_kwargs: {until: ['.'], max_gen_toks: 3, do_sample: false}\nmetric_list:\n  - metric: exact_match\n"
    )
    return folder


# ---- the answers


def test_the_numbers_are_those_of_lm_evals_own_model(byte_level, task_folder):
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [*TASKS, "rolled", "written"]
    manager = TaskManager(include_path=[str(catalogue.SUITES), str(task_folder)], include_defaults=False)
    theirs = HFLM(pretrained=str(byte_level), dtype="float32", device="cpu", batch_size=3)
    expected = evaluate(lm=theirs, task_dict=manager.load(names), limit=LIMIT, bootstrap_iters=0)
    found = catalogue.find_tasks(names, include_path=str(task_folder), limit=LIMIT)
    options = {"dtype": "float32", "batch_tokens": 300, "limit": LIMIT, "chat_template": False, "run_code": False}
    rows, numbers = asking.ask_model(locate_model(byte_level), found.tasks, progress=QUIET, **options)
    for name in names:
        values = {k: v for k, v in expected["results"][name].items() if "," in k and "stderr" not in k}
        ours = {k: numbers[name]["values"][k] for k in values}
        assert ours == pytest.approx(values, rel=1e-4) and numbers[name]["questions"] == LIMIT
    logged = {(s["doc_id"], m): s[m] for s in expected["samples"]["copying_words"] for m in s["metrics"]}
    assert {(r["question"], r["metric"]): r["value"] for r in rows if r["task"] == "copying_words"} == pytest.approx(
        logged, rel=1e-4
    )


def test_sequences_that_others_begin_with_are_not_read_again():
    chance = random.Random(0)
    text = [chance.randrange(3) for _ in range(19)]
    sequences = []
    for _ in range(40):
        end = chance.randrange(2, 20)
        sequences.append(tuple([*text[: end - 1], 7] if chance.random() < 0.3 else text[:end]))
    rows, places = keep_apart(sequences)
    assert not any(a is not b and b.tokens[: len(a.tokens)] == a.tokens for a in rows for b in rows)
    for sequence in sequences:
        row, path = places[sequence]
        assert tuple(rows[row].tokens[at] for at in path) == sequence


@pytest.mark.parametrize("vocab", [5, 4099])
def test_tokens_after_one_state_are_scored_by_one_row_of_logits(vocab):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(23, 7, generator=generator), torch.randn(vocab, 7, generator=generator)
    weight[2] = weight[3]  # two ids have the same logits
    layer = OutputLayer(weight=weight, bias=None, scale=1.0, soft_cap=None)
    scores = torch.log_softmax(hidden @ weight.T, dim=1)
    at = torch.randint(0, 23, (101,), generator=generator)
    gold = torch.randint(0, vocab, (101,), generator=generator)
    gold[:50] = scores[at[:50]].argmax(1)
    at[50:53], gold[50:53] = scores[:, 2].argmax(), torch.tensor([2, 3, 4])
    logprobs, greedy = score_tokens(hidden, layer, at, gold)
    torch.testing.assert_close(logprobs, scores[at, gold].double(), rtol=1e-5, atol=1e-5)
    assert greedy.tolist() == (scores[at].argmax(1) == gold).tolist() and greedy[:50].all()


def test_what_is_too_long_for_a_model_is_cut_on_the_left():
    assert cut_input([1, 2, 3], [4, 5], 100) == (1, 2, 3, 4)
    assert cut_input([1, 2, 3], [4, 5], 3) == (2, 3, 4)


def test_answers_come_back_from_their_folder(tmp_path, byte_level):
    rows, numbers = ask(byte_level, TASKS)
    answers.write_answers(tmp_path, rows, numbers)
    found, told = answers.read_answers(tmp_path)
    assert list(found) == list(TASKS) and told == numbers
    words = found["copying_words"]
    assert words.questions == list(range(LIMIT)) and list(words.values) == ["acc", "bits"]
    assert words.documents == ["0", "0", "0", "1", "1", "1", "2"]  # three questions about each list
    assert np.mean(words.values["bits"]) == pytest.approx(numbers["copying_words"]["values"]["bits,none"])


# ---- what is asked


def test_a_task_is_known_by_its_settings_and_its_questions(task_folder, tmp_path):
    def identify(folder: Path, limit: int | None = None) -> str:
        return catalogue.find_tasks(["written"], include_path=str(folder), limit=limit).hashes["written"]

    first = identify(task_folder)
    assert identify(task_folder) == first != identify(task_folder, 3)
    (tmp_path / "rows.jsonl").write_text((task_folder / "rows.jsonl").read_text())
    settings = (task_folder / "written.yaml").read_text().replace(str(task_folder), str(tmp_path))
    (tmp_path / "written.yaml").write_text(settings)
    assert identify(tmp_path) == first  # wherever it is
    (tmp_path / "other").mkdir()
    (tmp_path / "other/written.yaml").write_text(settings.replace("max_gen_toks: 3", "max_gen_toks: 4"))
    assert identify(tmp_path / "other") != first


def test_more_examples_than_a_task_has_are_refused(task_folder):
    assert catalogue.find_tasks(["written"], include_path=str(task_folder), num_fewshot=10).tasks
    with pytest.raises(ValueError, match=r"num_fewshot: written has 11 examples \(got 12\); ask for fewer"):
        catalogue.find_tasks(["written"], include_path=str(task_folder), num_fewshot=12)


def test_a_group_stands_for_its_tasks():
    found = catalogue.find_tasks(["minimal_pairs"], limit=LIMIT)
    assert found.members["minimal_pairs"] == tuple(f"minimal_pairs_{d}" for d in ("english", "french", "german"))
    assert found.by_size == {"minimal_pairs": True}


def test_suites_have_thousands_of_questions_without_repetitions():
    found = catalogue.find_tasks(["minimal_pairs", "copying"])
    docs = {name: list(task.eval_docs) for name, task in found.tasks.items()}
    assert sum(map(len, docs.values())) == 3 * 800 + 600 + 600 + 500
    for rows in docs.values():
        assert len({json.dumps(row, ensure_ascii=False) for row in rows}) == len(rows)
    for name in found.members["minimal_pairs"]:
        assert len({row["phenomenon"] for row in docs[name]}) == 10
        assert not {row["good"] for row in docs[name]} & {row["bad"] for row in docs[name]}


def test_presets_stand_for_tasks():
    assert choices.expand_presets(["paper", "x"], run_code=False, has_documents=False) == [*choices.PAPER, "x"]
    assert choices.expand_presets(["paper"], run_code=True, has_documents=False)[-1] == "humaneval"
    offline = choices.expand_presets(["offline", "copying"], run_code=False, has_documents=True)
    assert offline == ["minimal_pairs", "copying", "last_words", "continuations"]


def test_what_is_not_there_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="lm-eval has no task 'copyin'; did you mean 'copying'"):
        catalogue.find_tasks(["copyin"])
    with pytest.raises(ValueError, match="nowhere: no such folder; name one with tasks of lm-eval"):
        catalogue.find_tasks(["copying"], include_path=str(tmp_path / "nowhere"))
    rows = tmp_path / "rows.yaml"
    rows.write_text(f"task: gone\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/no.jsonl}}}}\n")
    with pytest.raises(ValueError, match=r"gone: its questions are not on this disk and cannot be fetched \(") as told:
        catalogue.find_tasks(["gone"], include_path=str(tmp_path))
    assert "\n" not in str(told.value)


# ---- differences


def make_answers(values: dict[str, list[float]], documents: list[str] | None = None) -> dict[str, TaskAnswers]:
    count = len(next(iter(values.values())))
    documents = documents or [f"{n}" for n in range(count)]
    return {"t": TaskAnswers(questions=list(range(count)), documents=documents, values=values)}


def compare(seeds, pairs=(("fused", "clm"),)):
    numbers = {"t": {"higher_is_better": {"acc": True, "bits": False}}}
    return compare_models(seeds, numbers, {"t": ["t"]}, pairs, {})


def test_differences_are_paired_over_documents():
    chance = np.random.default_rng(0)
    clm = (chance.random(211) < 0.4).astype(float)
    fused = np.where(chance.random(211) < 0.1, 1.0, clm)
    (row,) = compare([{"clm": make_answers({"acc": list(clm)}), "fused": make_answers({"acc": list(fused)})}])
    cell, change = row["differences"]["fused-clm"], fused - clm
    assert cell["value"] == pytest.approx(change.mean())
    error = change.std() / math.sqrt(211)
    assert cell["low"] == pytest.approx(change.mean() - 1.96 * error, abs=0.25 * error)
    assert cell["high"] == pytest.approx(change.mean() + 1.96 * error, abs=0.25 * error)
    assert (cell["only_first"], cell["only_second"]) == (change.sum(), 0)
    assert cell["p"] == pytest.approx(2 / 2 ** change.sum())
    assert row["questions"] == 211 and row["higher_is_better"]


def test_questions_about_one_document_count_as_one():
    chance = np.random.default_rng(0)
    values = np.repeat((chance.random(61) < 0.5).astype(float), 4)
    zeros = make_answers({"acc": [0.0] * 244}, [f"{n // 4}" for n in range(244)])
    wide = compare([{"clm": zeros, "fused": make_answers({"acc": list(values)}, zeros["t"].documents)}])[0]
    alone = make_answers({"acc": [0.0] * 244})
    narrow = compare([{"clm": alone, "fused": make_answers({"acc": list(values)})}])[0]
    widths = [
        row["differences"]["fused-clm"]["high"] - row["differences"]["fused-clm"]["low"] for row in (wide, narrow)
    ]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.15)


def test_seeds_count_together_and_widen_the_interval():
    chance = np.random.default_rng(0)
    seeds = []
    for shift in (0.1, 0.5, 0.9):
        clm = chance.normal(size=199)
        fused = clm - shift + 0.01 * chance.normal(size=199)
        seeds.append({"clm": make_answers({"bits": list(clm)}), "fused": make_answers({"bits": list(fused)})})
    cell = compare(seeds)[0]["differences"]["fused-clm"]
    assert cell["value"] == pytest.approx(-0.5, abs=0.01) and len(cell["by_seed"]) == 3
    assert cell["low"] < -1.4 and cell["high"] > 0.4  # Student's quantile of three seeds
    assert judge_difference(cell, higher_is_better=False) == "level"
    assert compare(seeds[:1])[0]["differences"]["fused-clm"]["high"] < 0
    assert "p" not in cell


def test_few_questions_have_no_interval():
    row = compare([{m: make_answers({"acc": [1.0, 0.0, 1.0]}) for m in ("clm", "fused")}])[0]
    assert row["differences"]["fused-clm"]["low"] is None and row["models"]["clm"]["value"] == pytest.approx(2 / 3)
    assert judge_difference(row["differences"]["fused-clm"], higher_is_better=True) == "unknown"


def test_mcnemar_counts_the_splits_that_are_as_uneven():
    for count in range(12):
        for one in range(count + 1):
            uneven = [abs(2 * k - count) >= abs(2 * one - count) for k in range(count + 1)]
            expected = sum(math.comb(count, k) for k in range(count + 1) if uneven[k]) / 2**count
            assert compute_mcnemar_p(one, count - one) == pytest.approx(expected)
    assert 0 < compute_mcnemar_p(900, 1100) < 1e-4


def test_models_that_were_asked_other_questions_are_not_compared():
    short = make_answers({"acc": [1.0] * 5})
    with pytest.raises(ValueError, match="t: models were asked different questions"):
        compare([{"clm": short, "fused": make_answers({"acc": [1.0] * 7})}])
