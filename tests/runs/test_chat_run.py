"""Run everything on conversations: from rows of messages to the table, each model in a template of its own."""

import json
import sys
from pathlib import Path

import chat_models
import numpy as np
import pytest
import same_stores
import tiny_run
from rich.console import Console

from fuselm.documents import document_list
from fuselm.documents.document import Document
from fuselm.models.chat.messages import END_OF_TURN, Dialogue, read_dialogue
from fuselm.results import bits_per_byte
from fuselm.runs import config
from fuselm.runs.estimates import estimate_row_bytes
from fuselm.runs.pipeline import Pipeline
from fuselm.sources import answering
from fuselm.stores.store import Store
from fuselm.system.progress import Progress


@pytest.fixture(scope="module")
def models(byte_level, sentence_piece, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": chat_models.add_template(byte_level, folder / "target"),
        "other": chat_models.add_template(sentence_piece, folder / "other", chat_models.BRACKETS),
        "base": byte_level,
    }


@pytest.fixture(scope="module")
def finished(models, texts, tmp_path_factory) -> Path:
    """Make a whole run of conversations, and some plain text beside them; return its folder."""
    folder = tmp_path_factory.mktemp("run")
    rows = chat_models.make_rows(texts) + [row | {"domain": "plain"} for row in tiny_run.short(texts, domains=1)]
    sources = {"other": models["other"], "same": models["target"]}
    file = tiny_run.write(folder, target=models["target"], sources=sources, rows=rows)
    outcome = tiny_run.fuselm("run", file)
    assert outcome.code == 0, outcome.err
    return folder / "out"


def find(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_a_run_scores_responses_and_texts_by_domain(finished):
    summary = json.loads((finished / "summary.json").read_text())
    scores = summary["models"]["fused"]
    assert set(scores["domains"]) == {"english", "french", "plain"}
    assert scores["average"]["bits_per_byte"] < summary["models"]["base"]["average"]["bits_per_byte"]


def test_documents_keep_their_messages(finished):
    documents = document_list.read_documents(find(finished, "corpus/*"))
    kinds = {type(d.text) for d in documents}
    assert kinds == {str, Dialogue}


def test_stores_hold_responses_alone(finished):
    documents = {d.id: d for d in document_list.read_documents(find(finished, "corpus/*"))}
    for name in ("capture/other-*", "align/other-*", "fuse/*"):
        store = Store(find(finished, name))
        for trace in store:
            text = documents[trace.document].text
            data = text.encode()
            assert trace.size == len(data)
            assert int(trace.lengths.sum()) == trace.size
            if isinstance(text, Dialogue):
                assert data.count(END_OF_TURN) == len(text.responses)
                assert trace.distributions.informed.all()
        store.check()


def test_a_source_that_is_the_target_is_fused_as_it_is(finished):
    captured, aligned = (Store(find(finished, f"{stage}/same-*")) for stage in ("capture", "align"))
    for trace in aligned:
        own = captured.read(trace.document)
        assert np.array_equal(trace.tokens, own.tokens)
        assert np.array_equal(trace.distributions.gold, own.distributions.gold)


COMMANDS = (
    ("inspect", "{out}", "--doc", "1"),
    ("fidelity", "{out}"),
    ("fidelity", "--source", "{other}", "--target", "{target}", "--texts", "{texts}", "--sampled-tokens", "0"),
    ("fidelity", "--source", "{other}", "--target", "{target}", "--texts", "{texts}", "--sampled-tokens", "400"),
    ("fidelity", "--source={base}", "--target={target}", "--texts={texts}", "--template=target", "--sampled-tokens=0"),
    ("diagnose", "{out}"),
    ("evaluate", "{target}", "--texts", "{texts}"),
    ("evaluate", "{base}", "--texts", "{texts}", "--template", "plain"),
    ("plan", "{run}"),
    ("plan", "{run}", "train.passes=2"),  # what is not done is timed
    ("store", "head", "{aligned}", "--rows", "300"),
    ("store", "verify", "{fused}"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_read_conversations(finished, models, command):
    places = {"out": finished, "run": finished.parent / "run.yaml", "texts": finished.parent / "corpus.jsonl"}
    places |= {"aligned": find(finished, "align/other-*"), "fused": find(finished, "fuse/*"), **models}
    outcome = tiny_run.fuselm(*(part.format(**places) for part in command))
    assert outcome.code == 0, outcome.err
    if command[0] == "inspect":
        assert "assistant, turn 1: " in outcome.out
    if command[0] == "inspect" or command[:2] == ("store", "head"):
        assert "(end)" in outcome.out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ("evaluate", "{base}", "--texts", "{texts}"),
            "so it reads no conversations; add --template (plain, or a file), or take a model that was trained on",
        ),
        (
            ("evaluate", "{target}", "--texts", "{texts}", "--template", "plain"),
            "every model has a template",
        ),
        (("evaluate", "{base}", "--texts", "{plain}", "--template", "plain"), "because the texts have no conversation"),
        (("evaluate", "{base}", "--texts", "{texts}", "--template", "none.jinja"), "--template: no file none.jinja"),
        (("evaluate", "{out}", "--template", "plain"), "--template: is for a model with --texts"),
        (("fidelity", "{out}", "--template", "plain"), "--template: has no effect on a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_template_that_is_missing_or_does_nothing_is_one_line(finished, models, tmp_path, command, said):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "words"}\n')
    places = {"out": finished, "texts": finished.parent / "corpus.jsonl", "plain": plain, **models}
    outcome = tiny_run.fuselm(*(part.format(**places) for part in command))
    assert outcome.code == 2 and said in outcome.err.splitlines()[-1]


def test_the_model_keeps_its_template_and_its_card_shows_how_to_talk_to_it(finished, models):
    name = "tokenizer_config.json"
    assert json.loads((finished / "model" / name).read_text())["chat_template"] == chat_models.LINES
    assert "apply_chat_template" in (finished / "model" / "README.md").read_text()


def test_a_source_without_a_template_gets_one_and_a_system_prompt(models, texts, tmp_path):
    rows = chat_models.make_rows(texts)
    train = tiny_run.TRAIN | {"on": "all", "passes": 1, "average": False}
    sources = {"other": models["other"], "untaught": models["base"]}
    file = tiny_run.write(tmp_path, target=models["target"], sources=sources, rows=rows, train=train)
    refused = tiny_run.fuselm("capture", file)
    assert refused.code == 2
    assert "has no chat template" in refused.err.splitlines()[-1]
    outcome = tiny_run.fuselm("run", file, "chat.template=plain", "sources.other.system=Speak.")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    "option", ["chat.template=plain", "train.on=all", "corpus.bad_rows=skip", "sources.other.system=Speak."]
)
def test_an_option_of_conversations_is_refused_without_any(models, texts, tmp_path, option):
    rows = tiny_run.short(texts)
    file = tiny_run.write(tmp_path, target=models["target"], sources={"other": models["other"]}, rows=rows)
    outcome = tiny_run.fuselm("run", file, option)
    assert outcome.code == 2
    assert f"{option.partition('=')[0]}: does nothing here, because the texts have no conversation" in outcome.err


def test_a_run_file_may_say_what_to_train_on(models, texts, tmp_path):
    rows = chat_models.make_rows(texts)
    file = tiny_run.write(tmp_path, target=models["target"], sources={"other": models["other"]}, rows=rows)
    file.write_text(file.read_text().replace("train:\n", "train:\n  on: all\n"))
    assert config.load(file).train.on == "all"


@pytest.mark.filterwarnings("default")  # Ray warns of itself
def test_workers_of_ray_capture_what_one_process_does(models, texts, tmp_path):
    pytest.importorskip("ray")
    rows, sources = chat_models.make_rows(texts), {"other": models["other"]}
    stores = []
    for name, overrides in (("here", []), ("ray", ["capture.engine=ray", "capture.workers=2"])):
        file = tiny_run.write(tmp_path / name, target=models["target"], sources=sources, rows=rows)
        outcome = tiny_run.fuselm("capture", file, "sources.other.system=Speak.", *overrides)
        assert outcome.code == 0, outcome.err
        stores.append(find(tmp_path / name / "out", "capture/other-*"))
    sys.modules["ray"].shutdown()
    same_stores.assert_same(*stores)


def test_a_source_answers_and_the_target_is_trained_on_its_best_answers(models, texts, tmp_path, monkeypatch):
    said = ["Yes, indeed it is.", "Yes it is.", "Perhaps, perhaps not."]
    monkeypatch.setattr(answering, "_answer", lambda source, prompts, count, seed: [said[:count]] * len(prompts))
    rows = chat_models.make_rows(texts)[:30]
    sources = {"other": models["other"]}
    file = tiny_run.write(tmp_path, target=models["target"], sources=sources, rows=rows)
    (tmp_path / "mine.py").write_text("def shortest(answer, row):\n    return -len(answer)\n")
    asked = ["write.answers={other: 3}", "train.passes=1"]
    asked += ["train.clm.passes=1", f"write.choose={tmp_path}/mine.py:shortest"]
    assert tiny_run.fuselm("plan", file, *asked).code == 0
    outcome = tiny_run.fuselm("run", file, *asked)
    assert outcome.code == 0, outcome.err
    folder = find(tmp_path, "**/write/other+answers-*")
    documents, written = (
        document_list.read_documents(find(tmp_path, "out/corpus/*")),
        document_list.read_documents(folder),
    )
    asked_again = {document.id: document for document in documents if document.split == "train"}
    assert written and {document.origin for document in written} <= {d.origin for d in asked_again.values()}
    assert {m.content for document in written for m in document.text.responses} == {"Yes it is."}
    store = Store(find(tmp_path, "out/fuse/*"))
    assert all(document.id in store for document in written)
    assert tiny_run.fuselm("train", file, *asked).stages == []
    size = len(b"Yes it is.\xff") * len(written)
    for name in ("report.html", "model/README.md"):
        assert f"{size:,} bytes" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_the_best_answer_is_the_most_probable_one_per_byte_to_all_sources(
    models, word_piece, texts, tmp_path, monkeypatch
):
    said = ["Yes, indeed it is.", "Yes it is.", "Perhaps, perhaps not."]
    monkeypatch.setattr(answering, "_answer", lambda source, prompts, count, seed: [said[:count]] * len(prompts))
    sources = {"other": models["other"], "third": chat_models.add_template(word_piece, tmp_path / "third")}
    file = tiny_run.write(tmp_path, target=models["target"], sources=sources, rows=chat_models.make_rows(texts)[:12])
    outcome = tiny_run.fuselm("capture", file, "write.answers={other: 3}")
    assert outcome.code == 0, outcome.err
    pairs = [json.loads(line) for line in find(tmp_path, "**/other+answers-*/pairs.jsonl").read_text().splitlines()]
    assert pairs
    pipeline, quiet = Pipeline(config.load(file), Console(quiet=True)), Progress(Console(quiet=True), "")
    for pair in pairs[:3]:
        before = [m | ({"weight": 0} if m["role"] == "assistant" else {}) for m in pair["prompt"]]
        talks = [read_dialogue({"messages": [*before, {"role": "assistant", "content": answer}]}) for answer in said]
        asked = [Document(id=f"{n}", origin=f"{n}", domain="d", split="train", text=t) for n, t in enumerate(talks)]
        bits = []
        for name in sources:
            model, vocabulary = pipeline.inputs.sources[name], pipeline.inputs.load_source_vocabulary(name)
            dtype = pipeline.precision.choose_dtype(f"source {name}", model)
            read = {"dtype": dtype, "batch_tokens": 64, "progress": quiet}
            scores = bits_per_byte.score_model(model, vocabulary, asked, **read)
            bits.append([score.bits for score in sorted(scores, key=lambda score: score.document)])
        numbers = np.log(np.exp2(-np.array(bits)).mean(axis=0)) / [len(t.encode()) for t in talks]
        (best,), (worst,) = pair["chosen"], pair["rejected"]
        assert numbers[said.index(best["content"])] == pytest.approx(numbers.max(), abs=1e-3)
        assert numbers[said.index(worst["content"])] == pytest.approx(numbers.min(), abs=1e-3)


def test_a_run_without_a_source_that_can_answer_is_refused(models, word_piece, texts, tmp_path):
    rows, options = chat_models.make_rows(texts), ["chat.template=target", "write.answers=2"]
    file = tiny_run.write(tmp_path, target=models["target"], sources={"plain": word_piece}, rows=rows)
    outcome = tiny_run.fuselm("plan", file, *options)
    assert outcome.code == 2
    assert "write.answers: no source can answer, because none of those that run here has a chat" in outcome.err


def test_answers_to_texts_are_refused(models, texts, tmp_path):
    rows, sources = tiny_run.short(texts, domains=1), {"other": models["other"]}
    file = tiny_run.write(tmp_path, target=models["target"], sources=sources, rows=rows)
    outcome = tiny_run.fuselm("plan", file, "write.answers={other: 1}")
    assert outcome.code == 2
    assert "write.answers: does nothing here, because the texts have no conversation; drop it" in outcome.err


def test_a_choice_among_one_answer_is_refused(models, texts, tmp_path):
    rows = chat_models.make_rows(texts)
    file = tiny_run.write(tmp_path, target=models["target"], sources={"other": models["other"]}, rows=rows)
    for option in ("write.answers=1", "write.answers=0"):
        outcome = tiny_run.fuselm("plan", file, option, "write.choose=majority")
        assert outcome.code == 2 and "write.choose: does nothing here, because write.answers is below 2" in outcome.err


def test_plan_expects_stores_of_the_responses_alone(finished):
    file = finished.parent / "run.yaml"
    outcome = tiny_run.fuselm("plan", file, "capture.draws=7", "--json")
    assert outcome.code == 0, outcome.err
    (expected,) = [row for row in json.loads(outcome.out)["stages"] if row["title"] == "capture other"]
    documents = document_list.read_documents(find(finished, "corpus/*"), "train")
    vocabulary = Pipeline(config.load(file), Console(quiet=True)).inputs.load_source_vocabulary("other")
    read = [vocabulary.segment(document.text) for document in documents]
    rows, tokens = sum(len(s.ids) for s in read), sum(len(s.read_ids) for s in read)
    assert expected["tokens"] == tokens and rows < 0.8 * tokens
    entries = float(expected["keeps"].split(": ")[1].split(",")[0])
    assert expected["kept_bytes"] == pytest.approx(rows * estimate_row_bytes(entries), rel=0.1)
