"""Every block of code on a page runs: shell and Python as they stand, run files as far as they are checked.

A page's blocks run one after the other in a folder with some texts. Hub models are replaced by tiny models of the same
kinds of tokenizers, and their training by a short one. What cannot run here is listed with its reason.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import markdown_blocks
import markdown_pages
import pytest
import tiny_run
import yaml
from safetensors.torch import load_file, save_file

from fuselm.runs import config
from fuselm.runs.merging.recipe import load_recipe
from fuselm.runs.studies import study

PAGES = [page for page in markdown_pages.find_pages() if markdown_blocks.find_blocks(page)]
LANGUAGES = {"shell", "python", "yaml", "json", "text"}
# Commands that need what a test has not, by how they begin. Longer beginnings are of one page.
NOT_RUN = {
    "pip install": "installs packages",
    "make ": "tested as a target of the Makefile",
    "vllm ": "needs vLLM and a GPU",
    "ssh ": "needs another machine",
    "docker ": "needs docker",
    "accelerate launch": "needs 8 GPUs; tests/training/test_processes.py trains with two processes",
    "lm_eval ": "fetches a task from the Hub; tests/results/test_tasks.py compares both on tasks of ours",
    "fuselm evaluate runs/mine --tasks": "fetches tasks from the Hub; tests/runs/test_task_stage.py asks ours",
    "fuselm evaluate HuggingFaceTB/SmolLM2-135M --tasks": "asks thousands of questions; tests/runs/test_task_stage.py",
    "python examples/chat/": "needs a finished run of examples/chat.yaml; tests/examples/test_chat.py",
    "python benchmarks/": "measures for hours; tests/benchmarks/test_commands.py starts each",
    "python -m tests.fuzz": "tests/fuzz/test_fuzz.py",
    "fuselm run my.yaml output=s3": "needs a bucket; tests/runs/test_remote_run.py has an S3 server",
    "fuselm store info s3": "needs a bucket; tests/runs/test_remote_run.py has an S3 server",
    "fuselm run examples/": "the demo: `make demo`",
    "fuselm inspect runs/quickstart": "needs the demo's run",
    "fuselm prune models/": "scores one of the demo's models for a minute; tests/runs/pruning",
    "fuselm store convert teacher.jsonl": "needs a server's answers; tests/sources/test_foreign.py",
    "fuselm store merge merged": "needs two captures; tests/stores/test_merging.py",
    "fuselm store push": "needs the Hub; tests/stores/test_hub_transfer.py has a stand-in",
    "fuselm store pull": "needs the Hub; tests/stores/test_hub_transfer.py has a stand-in",
    "fuselm push": "needs the Hub; tests/runs/test_hub_push.py has a stand-in",
    "pytest ": "a test",
    "OMP_NUM_THREADS=1 .venv/bin/pytest": "a test",
}
# Blocks by page and beginning.
NOT_RUN_THERE = {
    ("docs/tutorials/first-fusion.md", "from transformers"): "needs the demo's run",
    ("docs/tutorials/servers.md", "fuselm "): "needs vLLM; tests/sources/test_servers.py has a server of ours",
}
TINY = ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-Coder-0.5B", "google/gemma-3-270m")
SHORT = {"train": tiny_run.TRAIN | {"passes": 1, "average": 0}, "capture": {"prefix_tokens": 31}}


def reason_not_to_run(page: Path, text: str) -> str | None:
    of_page = [why for (name, start), why in NOT_RUN_THERE.items() if name == str(page) and text.startswith(start)]
    return next(iter(of_page), None) or next((why for start, why in NOT_RUN.items() if text.startswith(start)), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Make a folder with models, texts, the README's run file, and its finished run in runs/mine."""
    folder = tmp_path_factory.mktemp("pages")
    for name, made in zip(TINY, (byte_level, sentence_piece, sentence_piece), strict=True):
        shutil.copytree(made, folder / name)
    change_a_weight(folder / "google/gemma-3-270m/model.safetensors")
    tiny_run.write_rows(folder / "texts.jsonl", tiny_run.short(texts))
    block = next(b for b in markdown_blocks.find_blocks(Path("README.md")) if b.file_name == "my.yaml")
    (folder / "my.yaml").write_text(shorten(block.text), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tiny_run.fuselm("run", "my.yaml").code == 0
    return folder


@pytest.fixture
def folder(finished, page, tmp_path, monkeypatch) -> Path:
    """Make the folder that a page's blocks run in: one with a finished run for how-to pages, else without."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if page.parent.name != "how-to":
        shutil.rmtree(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def change_a_weight(path: Path) -> None:
    """Make another model of a copy."""
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, path, {"format": "pt"})


def run_command(command: str) -> None:
    """Run a command of a page: those of fuselm in this process, others in a shell."""
    words = shlex.split(command)
    if words[0] == "fuselm":
        given = [match for word in words[1:] for match in (sorted(glob.glob(word)) or [word])]
        outcome = tiny_run.fuselm(*given)
        assert outcome.code == 0, f"{command}: {outcome.err}"
    else:
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{command}: {run.stderr}"


def shorten(text: str) -> str:
    """Return a run or study file as a page shows it, with a short training of one seed."""
    shown = yaml.safe_load(text)
    if "method" in shown:
        return text
    short = SHORT | shown if "target" in shown else shown | {"seeds": [0]}
    return yaml.safe_dump(short, sort_keys=False)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_blocks_name_their_language(page):
    unknown = [f"{page}:{b.line}" for b in markdown_blocks.find_blocks(page) if b.language not in LANGUAGES]
    assert not unknown, f"say shell, python, yaml, json or text: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_blocks_run(page, folder):
    namespace: dict[str, object] = {"__name__": "page"}
    for block in markdown_blocks.find_blocks(page):
        if block.language == "shell":
            for command in markdown_blocks.commands(block):
                if not reason_not_to_run(page, command):
                    run_command(command)
        elif block.file_name:
            (folder / block.file_name).write_text(shorten(block.text), encoding="utf-8")
        elif block.language == "python" and not reason_not_to_run(page, block.text):
            exec(compile(block.text, f"{page}:{block.line}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_run_and_study_files_are_right(page, folder):
    """A whole file is read as the command reads it. A part of one is put into a small run file first."""
    for number, block in enumerate(b for b in markdown_blocks.find_blocks(page) if b.language == "yaml"):
        shown = yaml.safe_load(block.text)
        path = folder / (block.file_name or f"part-{number}.yaml")
        path.write_text(block.text, encoding="utf-8")
        if "experiments" in shown:
            study.load(path)
        elif "method" in shown:
            load_recipe(path)
        elif "target" in shown:
            config.load(path)
        else:
            path.write_text(yaml.safe_dump(complete(shown)), encoding="utf-8")
            config.load(path)


def complete(shown: dict) -> dict:
    """Return a run file with a part that a page shows."""
    known = {"output": "out", "target": "target", "corpus": {"files": ["texts.jsonl"]}}
    named = re.findall(r"(?:ratio|weights|temperatures): ?\{?(\w+)", yaml.safe_dump(shown, default_flow_style=True))
    return known | {"sources": {name: f"models/{name}" for name in {"qwen", "gemma", *named}}} | shown


def test_what_is_not_run_is_there():
    """No reason outlives its command."""
    shown = [
        (str(page), text)
        for page in PAGES
        for block in markdown_blocks.find_blocks(page)
        for text in [block.text, *(markdown_blocks.commands(block) if block.language == "shell" else ())]
    ]
    unused = [start for start in NOT_RUN if not any(text.startswith(start) for _, text in shown)]
    unused += [
        key for key in NOT_RUN_THERE if not any(page == key[0] and text.startswith(key[1]) for page, text in shown)
    ]
    assert not unused
