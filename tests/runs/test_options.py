"""Options of files: each is described in sentences, each choice has an implementation, other tools' names are known."""

import re
from pathlib import Path

import pytest
import yaml
from tiny_run import fuselm

from fuselm.alignment import aligner, choices
from fuselm.fusion import choices as fusion_choices
from fuselm.fusion import weights
from fuselm.runs import config
from fuselm.runs.config import RunOptions
from fuselm.runs.options.other_names import OTHER_NAMES
from fuselm.runs.options.outline import list_sections
from fuselm.runs.options.problems import suggest_option
from fuselm.runs.options.study import StudyOptions
from fuselm.sources import choices as source_choices
from fuselm.sources.interchange import foreign
from fuselm.stores import policies, retention
from fuselm.training import choices as training_choices
from fuselm.training import objective, target_training

SECTIONS = [*list_sections(RunOptions), *list_sections(StudyOptions, "study")]
FIELDS = {
    f"{section.name}.{name}".lstrip("."): field
    for section in SECTIONS
    for name, field in section.options.model_fields.items()
}


def test_all_sections_are_found():
    names = [section.name for section in list_sections(RunOptions)]
    assert names == [
        "", "target", "sources.NAME", "sources.NAME", "corpus", "corpus.dataset", "chat", "write", "capture", "align",
        "fuse", "train", "train.clm", "merge", "merge.models.NAME", "merge.base", "evaluate",
    ]  # fmt: skip
    assert [s.kind for s in list_sections(RunOptions) if s.kind] == ["model", "server"]
    assert [s.name for s in list_sections(StudyOptions)] == ["", "arms.NAME", "experiments.NAME"]


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_is_described_in_sentences(name):
    description = FIELDS[name].description or ""
    assert re.fullmatch(r"[A-Z][a-z]+ .*\.", description), description


@pytest.mark.parametrize(
    ("named", "implemented"),
    [
        (choices.METHODS, aligner.METHODS),
        (fusion_choices.FUNCTIONS, set(weights.WEIGHT_FUNCTIONS) - {"oracle"}),
        (training_choices.DIVERGENCES, objective.DIVERGENCES),
        (training_choices.CONFIDENCES, {"none", *objective.CONFIDENCES}),
        (training_choices.SCHEDULES, target_training.SCHEDULES),
        (policies.POLICY_DESCRIPTIONS, policies.POLICIES),
        (policies.CUTS, retention.WANTED),
        (source_choices.LAYOUTS, foreign.LAYOUTS),
    ],
)
def test_what_can_be_chosen_is_what_is_implemented(named, implemented):
    assert set(named) == set(implemented)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("paper.md", fusion_choices.FUNCTIONS),
        ("store.md", policies.POLICIES),
        ("store.md", source_choices.LAYOUTS),
    ],
)
def test_the_pages_have_a_row_for_every_choice(page, names):
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    assert not [name for name in names if not re.search(rf"^\| `{name}`", text, re.MULTILINE)]


@pytest.mark.parametrize("path", sorted({path for paths in OTHER_NAMES.values() for path in paths}))
def test_other_names_lead_to_options_that_exist(path):
    section, _, option = path.rpartition(".")
    assert any(s.name == section and option in s.list_names() for s in list_sections(RunOptions))


def test_a_name_of_ours_is_no_other_name_of_the_same_section():
    for name, paths in OTHER_NAMES.items():
        homes = {path.rpartition(".")[0] for path in paths}
        assert not [s.name for s in list_sections(RunOptions) if s.name in homes and name in s.list_names()]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("train.lr", "did you mean 'learning_rate'?"),
        ("train.epochs", "did you mean 'passes'?"),
        ("train.batch_size", "did you mean 'batch_documents'?"),
        ("capture.batch_size", "did you mean 'batch_tokens'?"),
        ("train.lora_r", "did you mean 'lora_rank'?"),
        ("train.max_length", "did you mean 'corpus.max_bytes'?"),
        ("train.clm.lr", "did you mean 'train.learning_rate'?"),
        ("lr", "did you mean 'train.learning_rate'?"),
        ("learning_rate", "did you mean 'train.learning_rate'?"),
        ("model", "did you mean 'target'?"),
        ("output_dir", "did you mean 'output'?"),
        ("train.method", "did you mean 'align.method'?"),
        ("fuse.temperature", "did you mean 'temperatures'?"),
        ("sources.a.torch_dtype", "did you mean 'dtype'?"),
        ("sources.a.path", "did you mean 'model'?"),
        (
            "evaluate.zzz",
            "known: batch_tokens, prefix_tokens, tasks, include_path, limit, num_fewshot, chat_template, run_code",
        ),
        ("train.lam", "did you mean 'lambda_clm'?"),
    ],
)
def test_what_was_meant_is_found_by_other_names_and_in_other_sections(given, hint):
    assert suggest_option(given.split("."), RunOptions) == hint


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("experiments.1.titel", "did you mean 'title'?"),
        ("arms.fused.methods", "did you mean 'method'?"),
        ("arms.fused.trials", "known: like, method, sources, set, try, best_of, chosen_on, seeds"),
        ("experiment", "did you mean 'experiments'?"),
    ],
)
def test_a_study_knows_its_own_options(given, hint):
    assert suggest_option(given.split("."), StudyOptions) == hint


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            ["models/qwen2.5-coder.gguf", "b"],
            "a list without names; write name: model, as {qwen: models/qwen2.5-coder.gguf}",
        ),
        (["org/Gemma-3"], "a list without names; write name: model, as {gemma: org/Gemma-3}"),
        ("models/a/", "one model without names; write name: model, as {a: models/a/}"),
        ([], "a list without names; write name: model, as {qwen: models/qwen}"),
    ],
)
def test_sources_need_names(tmp_path, sources, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output": "o", "target": "t", "corpus": {"files": ["x"]}, "sources": sources}))
    with pytest.raises(ValueError) as caught:
        config.load(path)
    assert str(caught.value) == f"{path}: sources: {message}"


def test_weights_of_sources_are_checked_wherever_they_come_from():
    from fuselm.fusion.priors import spread_weights

    given = {"a": {"fr": 0.0}, "b": 3.0}
    assert spread_weights(given, ["a", "b", "c"], ["en", "fr"]) == {"en": [1.0, 3.0, 1.0], "fr": [0.0, 3.0, 1.0]}
    with pytest.raises(ValueError, match=r"fuse.weights.a: a weight is 0 or more \(got -1\)"):
        spread_weights({"a": -1.0}, ["a"], ["en"])


RUN = "output: o\ntarget: t\nsources: {a: b}\ncorpus: {files: t.txt}\n"
STUDY = "run: r.yaml\noutput: o\nexperiments: []\n"
MERGE = "method: linear\nmodels: [a, b]\n"


@pytest.mark.parametrize(
    ("command", "text", "other"),
    [
        ("run", STUDY, "study"),
        ("run", MERGE, "merge"),
        ("study", RUN, "run"),
        ("study", MERGE, "merge"),
        ("merge", STUDY, "study"),
    ],
)
def test_a_file_of_another_command_is_named_as_one(tmp_path, command, text, other):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    outcome = fuselm(command, path)
    assert outcome.code == 2 and outcome.err.startswith(
        f"fuselm: {path}: this is a {other} file; take `fuselm {other}`"
    )


def test_one_file_of_texts_needs_no_list(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(RUN)
    assert config.load(path).corpus.files == ["t.txt"]
    assert config.load(path, ["corpus.files=u.txt"]).corpus.files == ["u.txt"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.passes=few", "train.passes: needs a whole number (got 'few')"),
        ("target=[a]", "target: needs options, as name: value (got ['a'])"),
        ("train=3", "train: needs options, as name: value (got 3)"),
        ("fuse.sharpness=high", "fuse.sharpness: needs a number (got 'high')"),
        ("corpus.files={a: b}", "corpus.files: needs a list (got {'a': 'b'})"),
    ],
)
def test_what_a_value_should_have_been_is_said_in_words(tmp_path, override, said):
    path = tmp_path / "a.yaml"
    path.write_text(RUN)
    with pytest.raises(ValueError, match=re.escape(said)):
        config.load(path, [override])


def test_an_option_is_suggested_with_its_section():
    assert "did you mean 'train.lambda_clm'?" in fuselm("options", "train.lam").err
