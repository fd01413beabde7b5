"""ray_workers.py on a real Ray of two workers: the store is that of one process, even if workers die."""

import importlib.util
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from captures import documents, source_of  # noqa: F401
from rich.console import Console
from same_stores import assert_same
from tiny_run import fuselm
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources import capture, ray_workers, resumable_writing
from fuselm.stores.retention import Policy
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

pytestmark = pytest.mark.filterwarnings("default")  # Ray warns of itself
has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'fuselm[ray]'")
HOW = {"policy": Policy(policy="threshold", threshold=0.01, top_k=13), "prefix_tokens": 41, "batch_tokens": 211}


@pytest.fixture(scope="module", autouse=True)
def stopped():
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(autouse=True)
def a_block_each_batch(monkeypatch):
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)
    monkeypatch.setattr(resumable_writing, "WINDOW_TOKENS", 997)
    monkeypatch.setattr(resumable_writing, "WINDOW_BATCHES", 0)


class Interrupted(Exception):
    pass


def captured(folder: Path, model: Path, documents, *, ray: bool, stop: bool = False) -> dict:
    shown, batches = Progress(Console(file=io.StringIO()), "capture"), iter(range(5))

    def advance(amount: int) -> None:
        if next(batches, None) is None:
            raise Interrupted

    if stop:
        shown.advance = advance

    def build(out: Path) -> dict:
        if not ray:
            return capture.capture_from_model(source_of(model), documents, out, **HOW, progress=shown)
        found = locate_model(str(model))
        vocabulary = Vocabulary(load_tokenizer(found), found.output_size)
        more = {"workers": 2, "revision": None, "dtype": "float32"}
        return ray_workers.capture_on_ray(found, vocabulary, documents, out, **more, **HOW, progress=shown)

    manifest.build_once(folder, Recipe(stage="capture"), build)
    return manifest.read(folder)["counts"]


@has_ray
def test_two_workers_make_the_store_of_one_process(tmp_path, byte_level, documents):
    captured(tmp_path / "one", byte_level, documents, ray=False)
    captured(tmp_path / "two", byte_level, documents, ray=True)
    assert_same(tmp_path / "two", tmp_path / "one")


def workers() -> list[int]:
    """Return the processes of Ray that hold the model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::") and b"CaptureWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@has_ray
def test_a_worker_killed_midway_costs_nothing_that_was_written(tmp_path, byte_level, documents):
    captured(tmp_path / "whole", byte_level, documents, ray=False)
    killed: list[int] = []

    def kill() -> None:
        while not list((tmp_path / "store.partial").glob(".block-*.parquet")):
            time.sleep(0.002)
        killed.extend(workers()[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    captured(tmp_path / "store", byte_level, documents, ray=True)
    thread.join()
    assert killed
    assert_same(tmp_path / "store", tmp_path / "whole")


@has_ray
def test_documents_with_nan_are_skipped_and_finished_ones_are_not_read_again(
    tmp_path,
    byte_level,
    documents,
    monkeypatch,
):
    monkeypatch.setattr(resumable_writing, "MOST_SKIPPED", 0.2)
    model = AutoModelForCausalLM.from_pretrained(byte_level)
    ids = [source_of(byte_level).vocabulary.segment(d.text).ids[:-1].tolist() for d in documents]
    token = next(t for t in range(641) if sum(t in row for row in ids) == 1 and t > 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(byte_level).save_pretrained(tmp_path / "model")

    expected = captured(tmp_path / "one", tmp_path / "model", documents, ray=False)
    assert len(expected["skipped"]) == 1
    with pytest.raises(Interrupted):
        captured(tmp_path / "two", tmp_path / "model", documents, ray=False, stop=True)
    counts = captured(tmp_path / "two", tmp_path / "model", documents, ray=True)
    assert counts["resumed_documents"] > 0 and counts == expected | {"resumed_documents": counts["resumed_documents"]}
    assert_same(tmp_path / "two", tmp_path / "one")


@has_ray
def test_a_run_on_ray_takes_a_capture_of_one_process(tmp_path, byte_level, word_piece, texts):
    sources = {"own": byte_level, "other": word_piece}
    run_file = tiny_run.write(tmp_path, target=byte_level, sources=sources, rows=tiny_run.short(texts))
    assert fuselm("capture", run_file).code == 0
    (other,) = (tmp_path / "out" / "capture").glob("other-*")
    os.rename(other, tmp_path / "other")
    outcome = fuselm("capture", run_file, "capture.engine=ray", "capture.workers=2")
    assert outcome.code == 0 and outcome.stages == ["capture other"], outcome.err
    assert_same(other, tmp_path / "other")


def test_without_ray_a_run_says_how_to_install_it(tmp_path, byte_level, documents, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"^capture\.engine: ray is not installed; pip install 'fuselm\[ray\]'$"):
        captured(tmp_path / "store", byte_level, documents, ray=True)


def test_workers_are_only_for_ray(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{output: x, target: t, sources: {a: b}, corpus: {files: [c]}, capture: {workers: 3}}")
    outcome = fuselm("run", path)
    assert outcome.code == 2 and "capture.workers: an option of engine ray (got engine 'local'); drop it" in outcome.err
