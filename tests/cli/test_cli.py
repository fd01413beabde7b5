"""Test cli/main.py: one line and exit code 2 for what a user can fix, only JSON on stdout, no early imports."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny_run
import yaml
from html_page import Page
from tiny_run import fuselm, fuselm_apart

METHODS = ["span", "mined", "exact", "cooccurrence", "statistics"]


@pytest.fixture
def run_file(tmp_path, byte_level, sentence_piece, texts) -> Path:
    return tiny_run.write(
        tmp_path, target=byte_level, sources={"own": byte_level, "other": sentence_piece}, rows=tiny_run.short(texts)
    )


def test_help_imports_nothing_that_takes_time(tmp_path):
    for arguments in (["--help"], ["run", "--help"], ["evaluate", "--help"]):
        outcome = fuselm_apart(*arguments, folder=tmp_path)
        assert outcome.code == 0 and "Usage:" in outcome.out and outcome.loaded == ()


def test_every_command_has_its_help():
    outcome = fuselm("--help")
    for command in ("run", "capture", "align", "fuse", "train", "evaluate", "report", "plan", "inspect", "fidelity"):
        assert f"\n  {command} " in outcome.out
        assert fuselm(command, "--help").code == 0


def without(folder: Path, *names: str, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*names))
    return to


def bad_corpus(name: str):
    """Return a function that makes a corpus file which cannot be used."""
    contents = {
        "empty.jsonl": b"",
        "blank.jsonl": b'{"text": "", "domain": "a"}\n{"text": " \\n", "domain": "a"}\n',
        "latin1.jsonl": '{"text": "déjà vu"}\n'.encode("latin-1"),
        "small.jsonl": b'{"text": "one", "domain": "a"}\n{"text": "two", "domain": "a"}\n',
        "list.jsonl": b'{"text": "one"}\n["two"]\n',
        "cut.jsonl": b'{"text": "one"}\n{"text": "tw',
        "average.jsonl": b'{"text": "one", "domain": "average"}\n' * 5,
    }

    def make(folder: Path, models: dict[str, Path]) -> list[str]:
        if name in contents:
            (folder / name).write_bytes(contents[name])
        return [f"corpus.files=[{folder / name}]"]

    return make


BAD = {
    "unknown option": (
        lambda folder, models: ["train.lamda=0.5"],
        "{run}: train.lamda: unknown option; did you mean 'lambda_clm'?",
    ),
    "lambda 2": (
        lambda folder, models: ["train.lambda_clm=2"],
        "{run}: train.lambda_clm: input should be less than or equal to 1 (got 2)",
    ),
    "a seed below 0": (
        lambda folder, models: ["seed=-1"],
        "{run}: seed: input should be greater than or equal to 0 (got -1)",
    ),
    "a weight in no domain": (
        lambda folder, models: ["fuse.weights.other={englsh: 2}"],
        "fuse.weights.other: no text is of domain 'englsh'; there are english, french",
    ),
    "no weight at all": (
        lambda folder, models: ["fuse.weights={own: 0, other: {french: 0}}"],
        "fuse.weights: no source has a part in domain 'french'; give one a weight above 0",
    ),
    "source twice": (
        lambda folder, models: [f"sources.again={models['sentence_piece']}"],
        "{run}: sources.again: {sentence_piece} is listed twice, as 'other' too; drop one",
    ),
    "no such corpus": (bad_corpus("absent.jsonl"), "{folder}/absent.jsonl: no such file"),
    "a file twice": (
        lambda folder, models: [f"corpus.files=[{folder}/corpus.jsonl, {folder}/../{folder.name}/corpus.jsonl]"],
        "corpus.files: {folder}/corpus.jsonl and {folder}/../",
    ),
    "endless writing": (
        lambda folder, models: ["write.ratio=.inf"],
        "{run}: write.ratio: input should be a finite number (got inf)",
    ),
    "empty corpus": (bad_corpus("empty.jsonl"), "corpus: no text in {folder}/empty.jsonl; each line needs"),
    "blank corpus": (bad_corpus("blank.jsonl"), "corpus: no text in {folder}/blank.jsonl; each line needs"),
    "not UTF-8": (bad_corpus("latin1.jsonl"), "{folder}/latin1.jsonl:1: not UTF-8 (byte 11 is 0xe9); convert it"),
    "small domain": (bad_corpus("small.jsonl"), "corpus: domain 'a' has 2 documents, too few to hold some out; "),
    "no object": (bad_corpus("list.jsonl"), "{folder}/list.jsonl:2: no 'text' string; each line needs one"),
    "not JSON": (bad_corpus("cut.jsonl"), "{folder}/cut.jsonl:2: not JSON ("),
    "domain average": (
        bad_corpus("average.jsonl"),
        "corpus: a domain is named 'average', which results use for themselves; rename it",
    ),
    "no such model": (
        lambda folder, models: [f"target={folder}/absent"],
        "{folder}/absent: no such folder or GGUF file",
    ),
    "no weights": (
        lambda folder, models: [
            f"sources.other={without(models['sentence_piece'], '*.safetensors', to=folder / 'bare')}"
        ],
        "{folder}/bare: no weights (model.safetensors or pytorch_model.bin, whole or sharded); needs a Hugging Face",
    ),
    "no tokenizer": (
        lambda folder, models: [f"target={without(models['byte_level'], 'tokenizer*', to=folder / 'bare')}"],
        "{folder}/bare: no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt); needs a Hugging Face",
    ),
    "empty model folder": (
        lambda folder, models: [(folder / "bare").mkdir() or f"target={folder / 'bare'}"],
        "{folder}/bare: empty folder; needs a Hugging Face model folder",
    ),
    "output is a file": (
        lambda folder, models: [(folder / "file").touch() or f"output={folder / 'file'}"],
        "{folder}/file: cannot write there (File exists); set another `output`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_model_is_loaded(case, tmp_path, run_file, byte_level, sentence_piece):
    make, message = BAD[case]
    models = {"byte_level": byte_level, "sentence_piece": sentence_piece}
    outcome = fuselm_apart("run", run_file, *make(tmp_path, models), folder=tmp_path)
    expected = message.format(run=run_file, folder=tmp_path, **models)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith(f"fuselm: {expected}"), outcome.err
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert not {"torch", "transformers"} & set(outcome.loaded)


ADAPTERS = {
    "modules": (
        "train.lora_modules=[nothing]",
        r"train.lora_modules: Target modules {'nothing'} not found .*; name linear layers of the target",
    ),
    "the output layer": ("train.lora_modules=[lm_head]", r"train.lora_modules: they name the output layer, .*"),
    "peft": (None, r"train.lora_rank: peft is not installed; pip install 'fuselm\[lora\]'"),
    "bitsandbytes": (
        "train.quantize=nf4",
        r"train.quantize: bitsandbytes is not installed; pip install 'fuselm\[qlora\]'",
    ),
    "wandb": (
        "train.trackers=[wandb]",
        r"train.trackers: wandb is not installed; pip install 'fuselm\[wandb\]'",
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize("case", ADAPTERS)
def test_what_training_lacks_is_one_line_before_anything_is_captured(case, run_file, monkeypatch):
    pytest.importorskip("peft")
    override, message = ADAPTERS[case]
    if case in ("peft", "bitsandbytes", "wandb"):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == case else find(name, *of))
        monkeypatch.setitem(sys.modules, case, None)
    outcome = fuselm("run", run_file, "train.lora_rank=3", *filter(None, [override]))
    assert outcome.code == 2 and outcome.stages == ["corpus"]
    assert re.fullmatch(f"fuselm: {message}", outcome.err.splitlines()[-1]), outcome.err


def test_a_missing_or_damaged_run_file_is_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [\n")
    for name, message in (("absent.yaml", "absent.yaml: no such file"), ("bad.yaml", "bad.yaml:2: not YAML (")):
        outcome = fuselm("run", tmp_path / name)
        assert outcome.code == 2 and outcome.err.startswith(f"fuselm: {tmp_path}/{message}")
        assert outcome.err.count("\n") == 1


def test_too_little_disk_is_one_line_before_any_model_is_loaded(run_file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    outcome = fuselm("run", run_file)
    assert outcome.code == 2 and not (run_file.parent / "out" / "capture").exists()
    line = outcome.err.splitlines()[-1]
    assert line.startswith(f"fuselm: {run_file.parent / 'out'}: 0.00 GiB free, but the run may need 0.0")
    assert line.endswith("make room, set another `output`, or keep fewer entries (capture.draws, align.top_k)")


def test_what_the_system_refuses_is_one_line(run_file, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr("fuselm.runs.pipeline.Pipeline.report", refuse)
    outcome = fuselm("run", run_file)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        "fuselm: /somewhere: No space left on device; fix this and run the same command again; it resumes here"
    )


def test_an_interrupt_is_not_an_error(run_file, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fuselm.runs.pipeline.Pipeline.report", interrupt)
    outcome = fuselm("run", run_file)
    assert outcome.code == 130 and "Traceback" not in outcome.err


def test_a_fault_of_our_own_is_not_hidden(run_file, monkeypatch):
    monkeypatch.setattr("fuselm.runs.pipeline.Pipeline.report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuselm("run", run_file)


def test_the_table_and_its_verdict_come_once_on_stdout(run_file):
    outcome = fuselm("run", run_file)
    assert outcome.code == 0
    assert outcome.out.count("bits per byte of held-out text") == 1 and outcome.out.count("\nfused is ") == 1
    for name in ("own", "other", "base", "clm", "fused", "fused - other", "english", "french", "average"):
        assert name in outcome.out
    for name in ("model", "report.html", "summary.json"):
        assert str(run_file.parent / "out" / name) in outcome.out


@pytest.fixture
def text_file(tmp_path, texts) -> Path:
    rows = [
        *tiny_run.short(texts),
        {"text": "no domain"},
        {"text": "", "domain": "english"},
        {"text": "\n", "domain": "odd"},
    ]
    return tiny_run.write_rows(tmp_path / "texts.jsonl", rows)


def strict(text: str) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_evaluate_prints_json_alone(tmp_path, word_piece, text_file):
    outcome = fuselm_apart("evaluate", word_piece, "--texts", text_file, "--json", folder=tmp_path)
    assert outcome.code == 0, outcome.err
    result = strict(outcome.out)
    assert set(result) == {"domains", "average"}
    assert set(result["domains"]) == {"english", "french", "odd", "texts"}
    for row in result["domains"].values():
        assert set(row) == {"bits_per_byte", "unspelled", "documents", "bytes"}  # WordPiece makes capitals small
    rows = [json.loads(line) for line in text_file.read_text(encoding="utf-8").splitlines()]
    for name, row in result["domains"].items():
        of_domain = [r["text"] for r in rows if r.get("domain", "texts") == name and r["text"]]
        assert row["documents"] == len(of_domain) and row["bytes"] == sum(len(t.encode()) for t in of_domain)
    mean = math.fsum(row["bits_per_byte"] for row in result["domains"].values()) / 4
    assert result["average"]["bits_per_byte"] == pytest.approx(mean)


@pytest.mark.parametrize("method", METHODS)
def test_fidelity_prints_json_alone(tmp_path, byte_level, sentence_piece, text_file, method):
    arguments = ("fidelity", "--source", sentence_piece, "--target", byte_level, "--texts", text_file)
    outcome = fuselm(*arguments, "--sampled-tokens", 1000, "--method", method, "--json")
    assert outcome.code == 0, outcome.err
    result = strict(outcome.out)
    expected = {"domains", "average", "verdict", "informed", "candidates_spelled", "spans", "categories", "causes"}
    assert set(result) == expected | {"conditional"}
    assert (
        result["conditional"] is None or result["conditional"]["tokens"] >= 0
    )  # random models hardly write characters
    assert set(result["domains"]) == {"english", "french", "odd", "texts"}
    for row in [result["average"], *result["domains"].values()]:
        assert set(row) == {"own_bits_per_byte", "aligned_bits_per_byte", "fidelity", "coverage", "mass_lost"}
        assert 0 <= row["coverage"] <= 1 and 0 <= row["mass_lost"] <= 1
        if row["fidelity"] is not None:
            assert row["fidelity"] == pytest.approx(row["aligned_bits_per_byte"] / row["own_bits_per_byte"])
        if method == "span":
            assert row["coverage"] == 1 and row["fidelity"] is not None


def test_fidelity_keeps_stdout_clean_in_a_process_of_its_own(tmp_path, byte_level, text_file):
    arguments = ("fidelity", "--source", byte_level, "--target", byte_level, "--texts", text_file, "--json")
    outcome = fuselm_apart(*arguments, folder=tmp_path)
    assert outcome.code == 0, outcome.err
    for row in strict(outcome.out)["domains"].values():
        assert row["fidelity"] == 1 and row["coverage"] == 1


NOT_MEASURED = "Conditional fidelity: not measured, as the source wrote no text."


def test_conditional_fidelity_is_a_sentence_and_a_part_of_the_page(tmp_path, byte_level, text_file):
    page = tmp_path / "page.html"
    arguments = ("fidelity", "--source", byte_level, "--target", byte_level, "--texts", text_file, "--report", page)
    outcome = fuselm(*arguments, "--sampled-tokens", 2000)
    assert outcome.code == 0, outcome.err
    said = "that the source wrote; draw more."  # random models hardly write characters
    assert said in " ".join(outcome.out.split()) and said in page.read_text(encoding="utf-8")
    assert "Usable with span" in page.read_text(encoding="utf-8")
    without = fuselm(*arguments, "--sampled-tokens", 0)
    assert without.code == 0 and NOT_MEASURED in " ".join(without.out.split())


def test_fidelity_of_several_methods_is_one_result_and_a_page(tmp_path, byte_level, sentence_piece):
    row = {"text": "<i>&</i> 🙂 你好, words 12", "domain": "<b>html</b>"}
    texts = tiny_run.write_rows(tmp_path / "texts.jsonl", [row])
    arguments = ["fidelity", "--source", sentence_piece, "--target", byte_level, "--texts", texts, "--json"]
    arguments += ["--sampled-tokens", 0]
    chosen = [part for method in METHODS for part in ("--method", method)]
    outcome = fuselm(*arguments, *chosen, "--report", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
    result = strict(outcome.out)
    methods = result.pop("methods")
    assert list(methods) == METHODS and result == methods[METHODS[0]]
    assert methods["exact"] == strict(fuselm(*arguments, "--method", "exact").out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "texts.jsonl"]
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [] and page.foreign_scripts == [] and "link" not in page.seen
    assert "://" not in html and "url(" not in html and "@import" not in html and str(tmp_path) not in html
    assert "<b>html" not in html and "<i>" not in html
    for text in (*METHODS, "<b>html</b>", "<", "&", "emoji", "CJK", "one to many", "Usable with span", NOT_MEASURED):
        assert text in page.texts, text
    other = f"{result['candidates_spelled']:.1%} of the source's other candidates spell what their bytes say."
    assert any(other in text for text in page.texts)
    assert "Not spelled:" not in html and "not spelled</th>" not in html


def test_a_page_says_what_is_not_spelled(tmp_path, byte_level, word_piece):
    texts = tiny_run.write_rows(tmp_path / "texts.jsonl", [{"text": "words 12 and Capital 你好", "domain": "mixed"}])
    arguments = ["fidelity", "--source", word_piece, "--target", byte_level, "--texts", texts, "--json"]
    outcome = fuselm(*arguments, "--method", "exact", "--method", "span", "--report", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
    result = strict(outcome.out)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert result["unspelled"]["source"] > 0 == result["unspelled"]["target"]
    assert f"Not spelled: {result['unspelled']['source']:.1%} of the bytes by the source, 0.0% by the target" in html
    assert "not spelled</th>" in html and f"{result['causes']['bits']['not_spelled']:.1%}</td>" in html


def test_fidelity_and_evaluate_agree_on_the_sources_own_bits(byte_level, sentence_piece, text_file):
    evaluated = strict(fuselm("evaluate", sentence_piece, "--texts", text_file, "--json").out)
    arguments = ("fidelity", "--source", sentence_piece, "--target", byte_level, "--texts", text_file, "--json")
    aligned = strict(fuselm(*arguments).out)
    for name, row in evaluated["domains"].items():
        assert aligned["domains"][name]["own_bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-4)


def test_without_json_there_is_a_table(byte_level, text_file):
    outcome = fuselm("evaluate", byte_level, "--texts", text_file)
    assert outcome.code == 0
    for name in ("domain", "bits_per_byte", "english", "french", "average"):
        assert name in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "MODEL"],
            "{model}: no run file (.yaml) or finished run; to evaluate a model, add --texts FILE.jsonl",
        ),
        (["evaluate", "MODEL", "--texts", "absent.jsonl"], "absent.jsonl: no such file"),
        (["evaluate", "absent", "--texts", "TEXTS"], "absent: no such folder or GGUF file, and not a hub id"),
        (
            ["evaluate", "MODEL", "--texts", "EMPTY"],
            "{empty}: no text in it; each line needs a 'text' that is not empty",
        ),
        (["evaluate", "MODEL", "--texts", "TEXTS", "--dtype", "int8"], "dtype 'int8': unknown; needs one of auto, "),
        (
            ["fidelity", "--source", "MODEL", "--target", "MODEL", "--texts", "TEXTS", "--method", "spam"],
            "--method spam: unknown; take one of span, branches, mined, exact, cooccurrence, statistics; "
            "did you mean 'span'?",
        ),
        (
            [
                "fidelity",
                "--source",
                "absent",
                "--target",
                "absent",
                "--texts",
                "TEXTS",
                "--report",
                "absent/page.html",
            ],
            "--report absent/page.html: no folder absent; make it, or name a file in another",
        ),
        (
            ["fidelity", "--source", "absent", "--target", "absent", "--texts", "TEXTS", "--report", "FOLDER"],
            "--report {folder}: a folder; name a file, such as {folder}/page.html",
        ),
        (
            ["fidelity", "--source", "absent", "--target", "absent", "--texts", "TEXTS", "--report", "EMPTY"],
            "--report {empty}: there already, and no HTML page; name another file",
        ),
        (
            ["inspect", "FOLDER"],
            "{folder}: no run there that captured anything; start it with `fuselm run`, or name another folder",
        ),
    ],
)
def test_bad_arguments_of_other_commands_are_one_line(tmp_path, byte_level, text_file, arguments, message):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    places = {"MODEL": byte_level, "TEXTS": text_file, "EMPTY": empty, "FOLDER": tmp_path}
    outcome = fuselm(*(places.get(a, a) for a in arguments))
    expected = message.format(model=byte_level, empty=empty, folder=tmp_path)
    assert outcome.code == 2 and outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"fuselm: {expected}")


def test_the_resolved_options_are_written_into_the_run(run_file):
    outcome = fuselm("capture", run_file, "train.lambda_clm=0.25")
    assert outcome.code == 0
    written = yaml.safe_load((run_file.parent / "out" / "config.yaml").read_text())
    assert written["train"]["lambda_clm"] == 0.25 and written["align"] == {"method": "branches", "top_k": 64}
