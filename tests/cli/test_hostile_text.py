"""Send one hostile string through every command, page, card and figure; no published file may name this machine.

It stands in tokens, documents, domains, names of folders and files. The folders' names hold a user's, too.
"""

import contextlib
import itertools
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_run
import yaml
from html_page import Page
from markdown_it import MarkdownIt
from tiny_run import fuselm
from tokenizers import Tokenizer

PLAIN = "[b]x\x1b]0;title\x07\x9b\u202e<script>alert(1)<script>&\"'`|*_{{ 7*7 }}%s{0}$x$~~:smile:\n# h\r\t\u2028#"
HOSTILE = PLAIN + "[/quote]</title></pre></script>-->"  # with what a file's name cannot have
DOMAIN = "".join(c for c in HOSTILE if unicodedata.category(c) not in ("Cc", "Zl", "Zp"))  # others are refused
SECRETS = ("secret-user-name", "secret-host")
LOCAL = ("config.yaml", "run.json", "steps.json")  # in a run's folder; docs/security.md says not to publish them


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "secret-user-name" / PLAIN
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def model(place, byte_level) -> Path:
    """Return a model whose vocabulary has markup, in a folder whose name has more."""
    folder = place / PLAIN
    shutil.copytree(byte_level, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["[/quote]", "[b]", "\x1b]0;", "<script>", "\u202e", "`|"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": str(folder)}))
    for name in ("trainer_state.json", "training_args.bin", "notes.txt"):
        (folder / name).write_text(str(folder))
    return folder


@pytest.fixture(scope="module")
def run(place, model, texts) -> Path:
    """Return the file of a finished run, made on a machine with a name to look for."""
    rows = [row | {"text": f"{HOSTILE} {row['text']}"} for row in tiny_run.short(texts, length=61)]
    rows = [row | {"domain": DOMAIN if row["domain"] == "french" else "plain"} for row in rows]
    train = tiny_run.TRAIN | {"passes": 1}
    run_file = tiny_run.write(place, target=model, sources={"own": model}, rows=rows, train=train)
    corpus = (place / "corpus.jsonl").rename(place / f"{PLAIN}.jsonl")
    options = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(options | {"corpus": {"files": [str(corpus)]}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "secret-host")
        patch.setenv("HOME", str(place.parent))
        assert_shown(fuselm("run", run_file))
    return run_file


def assert_shown(outcome) -> str:
    """Check that the command succeeded and nothing that it printed takes effect; return what it printed."""
    assert outcome.code == 0, outcome.err
    assert_harmless(outcome.out + outcome.err)
    return outcome.out


def assert_harmless(text: str) -> None:
    bad = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert not bad, (bad, text)


def store(run: Path, stage: str) -> Path:
    return next((run.parent / "out" / stage).glob("own-*"))


COMMANDS = {
    "run": lambda run, model: ["run", run],
    "plan": lambda run, model: ["plan", run],
    "capture": lambda run, model: ["capture", run],
    "evaluate": lambda run, model: ["evaluate", model, "--texts", run.parent / f"{PLAIN}.jsonl"],
    "inspect": lambda run, model: ["inspect", run.parent / "out", "--doc", "1", "--top", "7"],
    "diagnose": lambda run, model: ["diagnose", run.parent / "out"],
    "store info": lambda run, model: ["store", "info", store(run, "capture")],
    "store verify": lambda run, model: ["store", "verify", store(run, "align")],
    "store head": lambda run, model: ["store", "head", store(run, "capture"), "--rows", "199"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_lets_text_act(run, model, command):
    out = assert_shown(fuselm(*COMMANDS[command](run, model)))
    if command in ("inspect", "store head"):
        assert "[/quote]" in out and "[b]" in out and r"\x1b]0;" in out
    if command in ("run", "evaluate", "diagnose"):
        assert "[b]x" in out.replace("\n", "")


REFUSED = {
    "a run file": lambda run, model: ["run", run.parent / f"{PLAIN}.yaml"],
    "an option": lambda run, model: ["run", run, f"train.{PLAIN}=1"],
    "an override": lambda run, model: ["run", run, PLAIN],
    "a value": lambda run, model: ["run", run, f"train.precision={json.dumps(PLAIN)}"],
    "half a character": lambda run, model: ["run", run, "train.precision=\udcff"],
    "a source": lambda run, model: [
        "run",
        run,
        "sources={" + json.dumps(HOSTILE) + ": " + json.dumps(str(model)) + "}",
    ],
    "a model": lambda run, model: ["evaluate", model / PLAIN, "--texts", run.parent / f"{PLAIN}.jsonl"],
    "texts": lambda run, model: ["evaluate", model, "--texts", model / f"{PLAIN}.jsonl"],
    "a store": lambda run, model: ["store", "info", run.parent / PLAIN],
    "a layout": lambda run, model: ["store", "convert", "a", "b", "--from", HOSTILE],
    "a method": lambda run, model: ["fidelity", "--source", "a", "--target", "b", "--texts", "c", "--method", HOSTILE],
    "a command": lambda run, model: [HOSTILE],
    "an option of a command": lambda run, model: ["run", run, f"--{PLAIN}"],
    "a number": lambda run, model: ["inspect", run.parent / "out", "--doc", HOSTILE],
    "a study": lambda run, model: ["study", run.parent / f"{PLAIN}.yaml"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_no_text_that_acts(run, model, case):
    outcome = fuselm(*REFUSED[case](run, model))
    assert outcome.code == 2 and outcome.out == ""
    assert_harmless(outcome.err)
    assert "Traceback" not in outcome.err


def assert_page(path: Path) -> None:
    """Check that no text made an element, attribute or reference of the HTML."""
    html = path.read_text(encoding="utf-8")
    assert_harmless(html)
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [] and page.foreign_scripts == [] and page.seen.count("title") >= 1
    assert html.count("</pre>") == page.seen.count("pre") and "://" not in html
    assert any("<script>alert(1)<script>" in text for text in page.texts)
    assert any("{{ 7*7 }}" in text for text in page.texts) and "\\u202e" in html


def assert_markdown(path: Path, headings: set[str]) -> None:
    """Check that no text made an element of the Markdown."""
    text = path.read_text(encoding="utf-8")
    assert_harmless(text)
    if text.startswith("---\n"):
        _, front, text = text.split("---\n", 2)
        assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}  # the target is a local folder
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    assert not {"html_block", "html_inline", "s_open", "em_open"} & {token.type for token in [*tokens, *inline]}
    found = {
        "".join(child.content for child in after.children)
        for token, after in itertools.pairwise(tokens)
        if token.type == "heading_open"
    }
    assert {heading for heading in found if "[b]x" not in heading} == headings
    assert len(found) <= len(headings) + 1
    shown = "".join(child.content for child in inline)
    assert "<script>alert(1)<script>" in shown and "{{ 7*7 }}" in shown and r"\x1b" in shown


def test_pages_and_cards_have_no_element_of_text(run):
    out = run.parent / "out"
    assert_page(out / "report.html")
    assert_markdown(out / "model/README.md", {"Results", "Use", "Licence", "Citation"})
    assert json.loads((out / "summary.json").read_text())["heldout"].keys() == {DOMAIN, "plain"}
    assert_harmless((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def published(run, model) -> Path:
    """Return the run's folder with everything that the other commands write."""
    out = run.parent / "out"
    texts = run.parent / f"{PLAIN}.jsonl"
    assert_shown(fuselm("diagnose", out, "--report", out / "diagnosis.html"))
    fidelity = ["fidelity", "--source", model, "--target", model, "--texts", texts, "--report", out / "fidelity.html"]
    assert_shown(fuselm(*fidelity))
    captured, documents = store(run, "capture"), next((out / "corpus").iterdir()) / "documents.jsonl"
    for layout in ("vllm", "axolotl"):
        file = out / f"{layout}.jsonl"
        assert_shown(fuselm("store", "convert", captured, file, "--to", layout, "--documents", documents))
        made = ["--from", layout, "--tokenizer", model, "--model", model, "--tail", "0"]
        assert_shown(fuselm("store", "convert", file, out / f"from-{layout}", *made))
    assert_shown(fuselm("store", "subset", out / "subset", captured, "--documents", documents))
    assert_shown(fuselm("store", "merge", out / "merged", out / "subset"))
    study = run.parent / f"study {PLAIN}.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "run": run.name,
                "output": str(out / "study"),
                "seeds": [0],
                "set": {"corpus.files": [str(texts)]},
                "arms": {HOSTILE: {"method": "clm", "set": {"train.passes": 1}}},
                "experiments": [
                    {"name": "main", "title": HOSTILE, "says": HOSTILE, "arms": ["base", HOSTILE], "against": "base"}
                ],
            }
        )
    )
    for options in ([], ["--plan"], ["--report"]):
        assert_shown(fuselm("study", study, *options))
    return out


def test_pages_of_other_commands_have_no_element_of_text(published):
    for page in ("diagnosis.html", "fidelity.html"):
        assert_page(published / page)
    html = (published / "study/study.html").read_text()
    assert_harmless(html)
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [] and page.foreign_scripts == [] and "{{ 7*7 }}" in html
    figures = list((published / "study/figures").glob("*.svg"))
    assert figures
    for figure in figures:
        assert_harmless(figure.read_text())
        elements = {element.tag.partition("}")[2] for element in ElementTree.parse(figure).iter()}
        assert elements <= {"svg", "style", "g", "title", "text", "path", "circle", "line", "rect"}
    markdown = (published / "study/results.md").read_text()
    assert_harmless(markdown)
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    assert not {"html_block", "html_inline"} & {t.type for token in tokens for t in (token, *(token.children or ()))}
    rows = {line.count("|") - line.count("\\|") for line in markdown.splitlines() if line.startswith("| \\[b\\]")}
    assert rows and markdown.count("\n# ") == 1  # the heading in `says`, which is Markdown


def read_unpacked(path: Path) -> bytes:
    """Return everything that a file says, unpacked."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return repr((table.to_pydict(), pq.read_metadata(path).metadata, table.schema.metadata)).encode()
    return path.read_bytes()


def test_nothing_that_is_published_says_whose_machine_it_was(published):
    files = [p for p in published.rglob("*") if p.is_file() and str(p.relative_to(published)) not in LOCAL]
    files = [p for p in files if not p.relative_to(published).match("study/seed-0/*.*")]
    assert {"summary.json", "report.html", "README.md", "manifest.json", "study.json", "tokenizer_config.json"} <= {
        p.name for p in files
    }
    assert any("tfevents" in p.name for p in files) and any(p.suffix == ".parquet" for p in files)
    assert not {"trainer_state.json", "training_args.bin", "notes.txt"} & {p.name for p in files}
    for path in files:
        said = read_unpacked(path) + str(path.relative_to(published)).encode()
        for secret in (*SECRETS, str(published.parents[2])):
            assert secret.encode() not in said, (path.name, secret)


def test_a_terminal_gets_no_escape_that_is_not_ours(run, model):
    """Check in a real terminal: colours and bars are ours, but titles, bells and changes of direction are not."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    arguments = [sys.executable, "-m", "fuselm.cli.main", "capture", run, "seed=1"]
    process = subprocess.Popen(list(map(str, arguments)), stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says so that the other end is closed
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    assert b"\x1b[" in shown and b"[b]" in shown
    for bad in (b"\x1b]", b"\x07", "\x9b".encode(), "\u202e".encode(), "\u2028".encode()):
        assert bad not in shown
