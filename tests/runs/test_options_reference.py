"""The reference of options and the JSON schemas: up to date, complete, and as strict as the files are read."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from tiny_run import fuselm

from fuselm.runs.options import reference, schema

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


class ModernLoader(yaml.SafeLoader):
    """Reads 1e-5 as the number that it is in YAML 1.2, by which editors go."""


ModernLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def errors(options: dict, kind: str = "run") -> list[str]:
    made = schema.build_run_schema() if kind == "run" else schema.build_study_schema()
    jsonschema.Draft7Validator.check_schema(made)
    return [error.json_path for error in jsonschema.Draft7Validator(made).iter_errors(options)]


def test_the_page_of_options_is_up_to_date():
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == reference.write_markdown(), "run `fuselm options --markdown > docs/options.md`"


def test_the_page_of_options_has_every_option_once():
    headings = [line for line in reference.write_markdown().splitlines() if line.startswith("#### ")]
    assert len(headings) == len(set(headings)) == sum(len(group.options) for group in reference.list_groups())
    for name in ("train.lambda_clm", "corpus.files", "study.arms.NAME.try", "fuse.weights", "seed"):
        assert f"#### `{name}`" in headings
    assert "#### `sources.NAME.model`, a server" in headings


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schemas_take_all_examples(path):
    options = yaml.load(path.read_text(encoding="utf-8"), ModernLoader)
    assert errors(options, "study" if "experiments" in options else "run") == []


RUN = {
    "output": "out",
    "target": "models/a",
    "sources": {"a": "models/a", "b": {"model": "models/b", "dtype": "float32"}},
    "corpus": {"files": ["text.jsonl"]},
}
STUDY = {
    "run": "run.yaml",
    "output": "out",
    "arms": {"clm": {"method": "clm"}},
    "experiments": [{"name": "a", "title": "A", "arms": ["clm"]}],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"target": {"model": "a", "revision": "main"}},
        {"sources": {"far": {"server": "http://a/v1", "model": "m", "tokenizer": "t"}}},
        {"fuse": {"weights": "learned"}},
        {"fuse": {"weights": {"a": 2, "b": {"python": 0.5}}}},
        {"train": {"learning_rate": [1e-4, 2e-4], "average": False}},
        {"write": {"ratio": {"a": {"french": 4}}}},
    ],
)
def test_the_schema_takes_every_form_of_an_option(changes):
    assert errors(RUN | changes) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"sources": ["models/a"]}, "$.sources"),
        ({"sources": {}}, "$.sources"),
        ({"sources": {"a": {"model": "m", "tokenizer": "t"}}}, "$.sources.a"),
        ({"sources": {"a": {"server": "http://a/v1", "model": "m"}}}, "$.sources.a"),
        ({"target": 3}, "$.target"),
        ({"fuse": {"weights": "equal"}}, "$.fuse.weights"),
        ({"fuse": {"function": "oracle"}}, "$.fuse.function"),
        ({"train": {"lr": 1e-4}}, "$.train"),
        ({"train": {"learning_rate": 0}}, "$.train.learning_rate"),
        ({"corpus": {}}, "$.corpus"),
        ({"seed": -1}, "$.seed"),
        ({"epochs": 3}, "$"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(changes, where):
    assert errors(RUN | changes) == [where]


def test_a_file_without_what_every_run_needs_is_refused():
    for name in RUN:
        assert errors({key: value for key, value in RUN.items() if key != name}) == ["$"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, []),
        ({"set": {"train.passes": 3, "train": {"clm.passes": 1}, "fuse.weights.a": 2}}, []),
        ({"set": {"train": {"passes": 0}}}, ["$.set.train.passes"]),
        ({"set": {"train.lr": 3}}, ["$.set"]),
        ({"arms": {"clm": {"method": "clm", "try": {"train.learning_rate": [1e-4, 2e-4]}}}}, []),
        (
            {"arms": {"clm": {"method": "clm", "try": {"train.learning_rate": 1e-4}}}},
            ["$.arms.clm.try['train.learning_rate']"],
        ),
        ({"arms": {"clm": {"method": "sft"}}}, ["$.arms.clm.method"]),
        ({"experiments": [{"name": "a"}]}, ["$.experiments[0]"]),
    ],
)
def test_the_schema_of_a_study_knows_the_options_of_a_run(changes, where):
    assert errors(STUDY | changes, "study") == where


def test_one_option_is_printed_with_its_choices():
    outcome = fuselm("options", "align.method")
    assert outcome.code == 0
    assert (
        outcome.out.startswith("align: ")
        and "  align.method\n      one of the names below; default branches\n" in outcome.out
    )
    assert "mined: Pair tokens one to one" in outcome.out and "align.top_k" not in outcome.out


@pytest.mark.parametrize(
    ("name", "shown", "hidden"),
    [
        ("train", "train.clm.passes", "fuse.function"),
        ("sources.gemma.dtype", "sources.NAME.dtype", "sources.NAME.store"),
        ("learning_rate", "train.clm.learning_rate", "train.passes"),
        ("study.arms", "study.arms.NAME.try", "study.seeds"),
        ("study.experiments.1.title", "study.experiments.NAME.title", "study.experiments.NAME.says"),
    ],
)
def test_a_section_is_printed_with_all_within_it(name, shown, hidden):
    outcome = fuselm("options", name)
    assert outcome.code == 0 and f"  {shown}\n" in outcome.out and hidden not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr"], "train.lr: no such option; did you mean 'train.learning_rate'?"),
        (["tarin"], "tarin: no such option; did you mean 'train'?"),
        (["study.arm"], "study.arm: no such option; did you mean 'arms'?"),
        (["train", "--markdown"], "--markdown: prints the whole page; drop it or the name"),
    ],
)
def test_an_option_that_is_not_there_is_named(arguments, message):
    outcome = fuselm("options", *arguments)
    assert (outcome.code, outcome.err) == (2, f"fuselm: {message}\n")


def test_all_options_and_the_page_are_printed_by_one_command():
    assert all(f"  {o.name}\n" in fuselm("options").out for group in reference.list_groups() for o in group.options)
    assert fuselm("options", "--markdown").out == reference.write_markdown()


def test_the_command_prints_the_schemas():
    for kind, made in (("run", schema.build_run_schema()), ("study", schema.build_study_schema())):
        assert yaml.safe_load(fuselm("schema", kind).out) == made
    assert fuselm("schema").out == fuselm("schema", "run").out
    assert fuselm("schema", "runs").err == "fuselm: runs: no such file; take run or study\n"


def test_help_says_where_options_are_listed():
    assert "fuselm options" in " ".join(fuselm("run", "--help").out.split())
