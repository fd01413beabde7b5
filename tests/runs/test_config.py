"""Test config.py: what a run file may say, and one line for everything that it may not."""

from pathlib import Path

import pytest
import yaml

from fuselm.runs import config
from fuselm.runs.options.sources import LocalSourceOptions
from fuselm.stores.policies import POLICIES

GOOD = {
    "output": "out",
    "target": "models/a",
    "sources": {"a": "models/a", "b": {"model": "models/b", "dtype": "float32"}},
    "corpus": {"files": ["text.jsonl"]},
}


@pytest.fixture
def run_file(tmp_path):
    def write(text: str | None = None, **changes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(GOOD | changes), encoding="utf-8")
        return path

    return write


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "run.yaml")


def test_defaults_fill_a_small_run_file(run_file):
    run = config.load(run_file())
    assert run.train == config.TrainOptions() and run.capture == config.CaptureOptions() and run.seed == 0


def test_a_source_is_a_path_or_has_options(run_file):
    sources = config.load(run_file()).sources
    assert sources["a"] == LocalSourceOptions(model="models/a")
    assert sources["b"] == LocalSourceOptions(model="models/b", dtype="float32")


SERVER = {"server": "http://host:8000/v1/", "model": "served", "tokenizer": "models/a"}


def test_a_source_may_be_a_server(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "models" / "a").mkdir(parents=True)
    found = config.load(run_file(sources={"far": SERVER}), ["sources.far.requests=3"]).sources["far"]
    assert (found.server, found.model, found.requests) == ("http://host:8000/v1", "served", 3)
    assert found.tokenizer == str(tmp_path / "models" / "a")
    assert config.load(run_file(sources={"far": SERVER, "b": SERVER | {"server": "http://other/v1"}}))


@pytest.mark.parametrize(
    "source, message",
    [
        (SERVER | {"dtype": "auto"}, "sources.far.dtype: unknown option; known: server, model, tokenizer, revision, "),
        (SERVER | {"key": "secret"}, "sources.far.key: unknown option; did you mean 'key_env'?"),
        ({"model": "m", "tokenizer": "m"}, "sources.far.tokenizer: unknown option; known: model, revision, dtype"),
        ({"server": "http://host/v1", "model": "m"}, "sources.far.tokenizer: missing; every run needs it"),
        (SERVER | {"server": "host:8000"}, "sources.far.server: not the address of a server (got 'host:8000'); write "),
        (SERVER | {"server": "http://me:secret@host/v1"}, "sources.far.server: has a name or key in it; put the key "),
        (SERVER | {"requests": 0}, "sources.far.requests: input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_what_does_not_belong_to_a_server_is_named(run_file, source, message):
    said = problem(run_file(sources={"far": source}))
    assert said.startswith(f"run.yaml: {message}") and "secret" not in said


def test_the_target_is_no_server(run_file):
    assert problem(run_file(target=SERVER)).startswith("run.yaml: target.server: unknown option; known: model")


def test_the_examples_are_valid():
    for path in (Path(__file__).parents[2] / "examples").glob("*.yaml"):
        if not path.name.startswith("study"):  # tests/test_study.py reads those
            config.load(path)


def test_a_resolved_run_loads_as_itself(run_file):
    run = config.load(run_file(), ["train.lambda_clm=0.25"])
    assert config.load(run_file(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))) == run


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001"])
def test_numbers_may_be_written_as_in_python(run_file, number):
    text = yaml.safe_dump(GOOD) + f"train:\n  learning_rate: {number}\n"
    assert config.load(run_file(text)).train.learning_rate == 1e-4
    assert config.load(run_file(), [f"train.learning_rate={number}"]).train.learning_rate == 1e-4


def test_several_learning_rates_may_be_given(run_file):
    train = config.load(run_file(), ["train.learning_rate=[1e-4, 3e-4]", "train.clm.learning_rate=[5e-5]"]).train
    assert train.for_method("fused").learning_rates == [1e-4, 3e-4] and train.for_method("clm").learning_rates == [5e-5]


def test_the_baseline_has_its_own_settings_where_it_says_any(run_file):
    train = config.load(run_file(), ["train.passes=5", "train.average=2", "train.clm={passes: 3, average: null}"]).train
    fused, clm = train.for_method("fused"), train.for_method("clm")
    assert (fused.passes, fused.average, fused.lr_schedule) == (5, 2.0, "constant")
    assert (clm.passes, clm.average, clm.lr_schedule) == (3, 2.0, "cosine")


def test_the_baseline_may_be_regularised_by_itself(run_file):
    given = ["train.weight_decay=2", "train.clm={lora_rank: 8, weight_decay: 0, dropout: 0.25}"]
    train = config.load(run_file(), given).train
    fused, clm = train.for_method("fused"), train.for_method("clm")
    assert (fused.weight_decay, fused.lora_rank, fused.dropout) == (2, None, 0)
    assert (clm.weight_decay, clm.lora_rank, clm.dropout) == (0, 8, 0.25)
    always = ["learning_rate", "lr_schedule", "passes", "average"]
    assert list(train.model_dump()["clm"]) == [*always, "weight_decay", "dropout", "lora_rank"]


@pytest.mark.parametrize("where", ["train", "train.clm"])
def test_decay_towards_the_start_needs_a_factor(run_file, where):
    with pytest.raises(ValueError, match=rf"{where}\.decay_towards: does nothing here, because weight_decay is 0"):
        config.load(run_file(), [f"{where}={{decay_towards: start, weight_decay: 0}}"])


def test_by_default_weights_are_averaged_from_the_first_pass_on_or_half_of_one(run_file):
    for passes, average in ((4, 1), (2, 1), (1, 0.5)):
        train = config.load(run_file(), [f"train.passes={passes}"]).train
        assert train.for_method("fused").average == average and train.for_method("clm").average is False


def test_by_default_the_weights_of_sources_are_learned(run_file):
    assert config.load(run_file()).fuse.recipe["weights"] == "learned"
    assert config.load(run_file(), ["fuse.function=bayes"]).fuse.recipe["weights"] == {}
    assert config.load(run_file(), ["fuse.weights.a=2"]).fuse.recipe["weights"] == {"a": 2}


@pytest.mark.parametrize("where", ["train", "train.clm"])
def test_a_mean_of_no_weights_is_refused(run_file, where):
    with pytest.raises(ValueError, match=rf"{where}.average: must be below passes, 2 \(got 2\)"):
        config.load(run_file(), ["train.passes=2", f"{where}.average=2"])


def test_overrides_reach_nested_and_new_options(run_file):
    run = config.load(run_file(), ["train.passes=3", "seed=7", "evaluate.batch_tokens=97", "output=elsewhere"])
    assert (run.train.passes, run.seed, run.evaluate.batch_tokens, run.output) == (3, 7, 97, "elsewhere")


def test_overrides_reach_sources(run_file):
    run = config.load(run_file(), ["sources.a.dtype=bfloat16", "sources.c=models/c", "target.dtype=float32"])
    assert run.sources["a"] == LocalSourceOptions(model="models/a", dtype="bfloat16")
    assert run.sources["c"] == LocalSourceOptions(model="models/c")
    assert run.target == config.ModelOptions(model="models/a", dtype="float32")


def test_the_last_override_wins(run_file):
    assert config.load(run_file(), ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_hold_an_equals_sign(run_file):
    assert config.load(run_file(), ["output=a=b"]).output == "a=b"


def test_paths_are_found_beside_the_run_file(run_file, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.jsonl").touch()
    (tmp_path / "models" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = config.load(run_file())
    assert run.corpus.files == [str(tmp_path / "text.jsonl")]
    assert run.target.model == run.sources["a"].model == str(tmp_path / "models" / "a")
    assert run.sources["b"].model == "models/b"  # not there either: may be a hub id


def test_a_home_folder_may_be_written_as_a_tilde(run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = ["output=~/runs", "corpus.files=[~/a.jsonl]", "sources.a={model: ~/a, store: ~/stores/a}"]
    run = config.load(run_file(), given)
    home = tmp_path / "home"
    assert (run.output, run.corpus.files) == (str(home / "runs"), [str(home / "a.jsonl")])
    assert (run.sources["a"].model, run.sources["a"].store) == (str(home / "a"), str(home / "stores/a"))


def test_a_home_folder_of_nobody_is_refused(run_file):
    expected = "output: no home folder is known for ~nobody-here (got ~nobody-here/runs); write the whole path"
    assert problem(run_file(output="~nobody-here/runs")) == expected


def test_a_text_may_look_like_a_number(run_file):
    assert config.load(run_file(), ["target.revision='12345e6'"]).target.revision == "12345e6"
    assert config.load(run_file(), ["target.revision=12345e6"]).target.revision == "12345e6"
    assert config.load(run_file(), ["target.revision='1234567'"]).target.revision == "1234567"


def test_the_current_directory_comes_before_the_run_files(run_file, tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        (folder / "text.jsonl").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.load(run_file()).corpus.files == ["text.jsonl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lamda=0.5", "run.yaml: train.lamda: unknown option; did you mean 'lambda_clm'?"),
        ("train.learing_rate=1", "run.yaml: train.learing_rate: unknown option; did you mean 'learning_rate'?"),
        ("corpsu.files=[a]", "run.yaml: corpsu: unknown option; did you mean 'corpus'?"),
        ("fuse.leve=token", "run.yaml: fuse.leve: unknown option; did you mean 'level'?"),
        ("sources.a.dtyp=x", "run.yaml: sources.a.dtyp: unknown option; did you mean 'dtype'?"),
        ("target.zzz=x", "run.yaml: target.zzz: unknown option; known: model, revision, dtype"),
    ],
)
def test_an_unknown_option_is_named_with_what_was_meant(run_file, override, message):
    assert problem(run_file(), override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.jsd_beta=0.3",
            "run.yaml: train.jsd_beta: does nothing here, because divergence is not jsd; drop one or set the other",
        ),
        (
            "train.lora_alpha=8",
            "run.yaml: train.lora_alpha: does nothing here, because lora_rank is not set; drop one or set the other",
        ),
        (
            "train.lora_dropout=0.1",
            "run.yaml: train.lora_dropout: does nothing here, because lora_rank is not set; drop one or set the other",
        ),
        (
            "train.lora_modules=[q_proj]",
            "run.yaml: train.lora_modules: does nothing here, because lora_rank is not set; drop one or set the other",
        ),
        (
            "train.quantize=nf4",
            "run.yaml: train.quantize: does nothing here, because lora_rank is not set; drop one or set the other",
        ),
        ("train.lambda_clm=2", "run.yaml: train.lambda_clm: input should be less than or equal to 1 (got 2)"),
        ("train.lambda_clm=-0.1", "run.yaml: train.lambda_clm: input should be greater than or equal to 0 (got -0.1)"),
        ("train.lambda_final=1.5", "run.yaml: train.lambda_final: input should be less than or equal to 1 (got 1.5)"),
        ("train.passes=0", "run.yaml: train.passes: input should be greater than or equal to 1 (got 0)"),
        (
            "align.method=spam",
            "run.yaml: align.method: input should be 'span', 'branches', 'mined', 'exact', 'cooccurrence' or "
            "'statistics' (got 'spam')",
        ),
        ("capture.batch_tokens=many", "run.yaml: capture.batch_tokens: needs a whole number (got 'many')"),
        ("train.learning_rate=0", "run.yaml: train.learning_rate: input should be greater than 0 (got 0)"),
        ("train.learning_rate=[1e-4, -1]", "run.yaml: train.learning_rate.1: input should be greater than 0 (got -1)"),
        ("train.learning_rate=[]", "run.yaml: train.learning_rate: list should have at least 1 item"),
        ("sources={}", "run.yaml: sources: "),
        ("corpus.files=[]", "run.yaml: corpus: no texts; give it `files`, or a `dataset`"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(run_file, override, message):
    assert problem(run_file(), override).startswith(message)


@pytest.mark.parametrize("value", [".nan", "nan", ".inf"])
def test_lambda_is_a_number(run_file, value):
    assert problem(run_file(), f"train.lambda_clm={value}").startswith("run.yaml: train.lambda_clm: ")


def test_splits_leave_something_to_train_on(run_file):
    assert problem(run_file(), "corpus.dev=0.5", "corpus.heldout=0.5") == (
        "run.yaml: corpus: dev 0.5 and heldout 0.5 leave nothing to train on; their sum must be below 1"
    )


@pytest.mark.parametrize("name", ["base", "clm", "fused", "average", "a/b", "..", "a b"])
def test_a_source_has_a_usable_name(run_file, name):
    message = problem(run_file(sources={name: "models/a"}))
    assert message == (
        f"run.yaml: sources.{name}: not a usable name; take letters, digits, '-', '_' and '.', and none of "
        "average, base, clm, fused"
    )


@pytest.mark.parametrize("path", ["models/a", "./models/a", "models/a/", "models/../models/a"])
def test_a_source_is_not_listed_twice(run_file, path):
    message = problem(run_file(sources={"a": "models/a", "again": path}))
    assert message == f"run.yaml: sources.again: {path} is listed twice, as 'a' too; drop one"


def test_an_option_is_not_given_twice(run_file):
    text = "output: out\ntarget: a\nsources:\n  a: models/a\n  b: models/b\n  a: models/c\ncorpus: {files: [t]}\n"
    assert problem(run_file(text)) == "run.yaml:6: not YAML ('a' is given twice; drop one)"


@pytest.mark.parametrize("name", ["output", "target", "sources", "corpus"])
def test_what_every_run_needs_is_asked_for(run_file, name):
    text = yaml.safe_dump({key: value for key, value in GOOD.items() if key != name})
    assert problem(run_file(text)) == f"run.yaml: {name}: missing; every run needs it"


def test_a_missing_run_file_is_named(tmp_path):
    assert problem(tmp_path / "run.yaml") == "run.yaml: no such file"


def test_a_folder_is_no_run_file(tmp_path):
    assert problem(tmp_path).endswith(": not a run file; `fuselm run` takes a YAML file")


def test_a_binary_file_is_no_run_file(run_file, tmp_path):
    path = run_file("")
    path.write_bytes(b"\x80\xff")
    assert problem(path) == "run.yaml: not a run file; `fuselm run` takes a YAML file"


def test_a_line_that_is_not_yaml_is_named(run_file):
    message = problem(run_file("output: out\ntarget: [a\nsources: b\n"))
    assert message.startswith("run.yaml:3: not YAML (")


@pytest.mark.parametrize("text", ["", "- a\n", "plain\n"])
def test_yaml_without_options_is_no_run_file(run_file, text):
    assert problem(run_file(text)) == "run.yaml: not a run file; it needs options such as target, sources and corpus"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.passes", "train.passes: not an override; write option.name=value"),
        ("=3", "=3: not an override; write option.name=value"),
        ("seed=[1", "seed=[1: the value is not YAML"),
    ],
)
def test_an_override_that_is_none_is_named(run_file, override, message):
    assert problem(run_file(), override) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["capture.top_k=7"],
            "capture.top_k: an option of threshold and top_k and nucleus, but capture.policy is sampled",
        ),
        (
            ["capture.policy=threshold", "capture.draws=7"],
            "capture.draws: an option of sampled, but capture.policy is threshold; drop one of them",
        ),
        (
            ["capture.policy=top_k", "capture.mass=0.9"],
            "capture.mass: an option of nucleus, but capture.policy is top_k",
        ),
        (
            ["capture.policy=sampled", "capture.top_k=7"],
            "capture.top_k: an option of threshold and top_k and nucleus, but capture.policy is sampled; drop one of",
        ),
        (["capture.policy=best"], "capture.policy: input should be 'threshold', 'top_k', 'nucleus' or 'sampled'"),
    ],
)
def test_an_option_of_another_policy_is_refused(run_file, options, message):
    with pytest.raises(ValueError) as caught:
        config.load(run_file(), options)
    assert f"run.yaml: {message}" in str(caught.value)


def test_each_policy_knows_its_numbers(run_file):
    for policy, numbers in POLICIES.items():
        options = config.load(run_file(), [f"capture.policy={policy}"]).capture
        assert options.retention == {"policy": policy} | numbers
        again = config.CaptureOptions.model_validate(options.model_dump())
        assert again == options
    chosen = config.load(run_file(), ["capture.policy=threshold", "capture.top_k=9"])
    assert chosen.capture.retention["top_k"] == 9


def test_what_cannot_be_drawn_from_keeps_a_threshold(run_file):
    given = yaml.safe_dump(SERVER, default_flow_style=True).strip()
    run = config.load(run_file(), [f"sources.b={given}", "capture.draws=7"])
    assert run.capture_options("a").retention == {"policy": "sampled", "draws": 7}
    assert run.capture_options("b").retention == {"policy": "threshold"} | POLICIES["threshold"]
    run = config.load(run_file(), [f"sources.b={given}", "capture.policy=nucleus"])
    assert run.capture_options("a").retention == run.capture_options("b").retention == run.capture.retention


def test_servers_read_documents_with_nothing_in_front(run_file):
    given = yaml.safe_dump(SERVER, default_flow_style=True).strip()
    run = config.load(run_file(), [f"sources.b={given}"])
    assert (run.capture_options("a").prefix_tokens, run.capture_options("b").prefix_tokens) == (256, 0)
    of_servers = [f"sources.b={given}", "sources.a={model: models/a, store: there}", "capture.prefix_tokens=64"]
    assert "capture.prefix_tokens: does nothing here, because every source is a" in problem(run_file(), *of_servers)
    assert config.load(run_file(), [*of_servers[:2], "capture.prefix_tokens=0"]).capture.prefix_tokens == 0


@pytest.mark.parametrize(
    ("override", "only"),
    [
        ("seed=1", True),
        ("fuse.function=bayes", True),
        ("fuse.function=entropy", False),
        ("fuse.function=log_linear", False),
        ("fuse.temperatures={a: 2}", False),
        ("train.temperature=2", False),
        ("train.divergence=jsd", False),
        ("train.confidence=expected", False),
    ],
)
def test_draws_do_where_rows_are_only_averaged(run_file, override, only):
    assert config.load(run_file(), [override]).is_linear_in_rows == only


@pytest.mark.parametrize("weights", ["learned", "{a: 2}", "{a: {python: 0, english: 0.5}, b: 1}"])
def test_weights_are_numbers_or_by_domain_or_learned(run_file, weights):
    assert config.load(run_file(), [f"fuse.weights={weights}"]).fuse.weights == yaml.safe_load(weights)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fuse.weights.c=2"], "fuse.weights.c: no such source; there are a, b"),
        (["fuse.temperatures={c: 2}"], "fuse.temperatures.c: no such source; there are a, b"),
        (["fuse.weights.a=-2"], "fuse.weights.a: a weight is 0 or more (got -2)"),
        (["fuse.weights.a={python: .nan}"], "fuse.weights.a: a weight is 0 or more (got nan)"),
        (["fuse.temperatures.a=.inf"], "fuse.temperatures.a: input should be a finite number (got inf)"),
        (
            ["fuse.sharpness=2"],
            "fuse.sharpness: does nothing here, because function is 'fixed'; drop one or set the other",
        ),
        (["fuse.window=97"], "fuse.window: does nothing here, because level is 'token'; drop one or set the other"),
        (
            ["fuse.function=min_ce", "fuse.switch=0.1"],
            "fuse.switch: does nothing here, because function is 'min_ce'; drop one or set the other",
        ),
        (["fuse.sharpness=.inf"], "fuse.sharpness: input should be a finite number (got inf)"),
        (["fuse.temperatures.a=0"], "fuse.temperatures.a: input should be greater than 0 (got 0)"),
        (
            ["fuse.function=bayes", "fuse.level=document"],
            "fuse.level: bayes has none (got 'document'); take another function, such as min_ce, or "
            "leave it at 'token'",
        ),
        (
            ["fuse.function=oracle"],
            "fuse.function: oracle is what `fuselm diagnose` compares with; its rows are those of min_ce with "
            "level: token",
        ),
    ],
)
def test_what_fusing_cannot_mean_is_refused(run_file, overrides, message):
    assert problem(run_file(), *overrides) == f"run.yaml: {message}"


def test_a_batch_is_of_documents_or_of_tokens(run_file):
    assert config.load(run_file(), ["train.pack_tokens=512"]).train.batch_documents is None
    with pytest.raises(
        ValueError, match=r"train.batch_documents: does nothing here, because pack_tokens says what a batch is"
    ):
        config.load(run_file(), ["train.pack_tokens=512", "train.batch_documents=4"])


def test_reverse_kl_needs_the_tail(run_file):
    with pytest.raises(ValueError, match=r"train.tail: renormalise .* so reverse_kl is infinite; take bucket"):
        config.load(run_file(), ["train.divergence=reverse_kl", "train.tail=renormalise"])


def test_a_resolved_run_file_is_a_run_file(run_file, tmp_path):
    run = config.load(run_file(), ["train.lora_rank=8", "train.divergence=jsd", "train.pack_tokens=512"])
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert config.load(tmp_path / "resolved.yaml") == run
