"""Test connection.py on a real llama.cpp server with one of the demo's models, beside the same model here.

Runs where FUSELM_LLAMA_SERVER names a Python that has `llama-cpp-python[server]`; see docs/servers.md.
"""

import io
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from captures import source_of
from rich.console import Console

from fuselm.documents.corpus import Document
from fuselm.sources import capture, resumable_writing
from fuselm.sources.servers import client, server_capture
from fuselm.sources.servers.connection import Server, find_server
from fuselm.stores import store
from fuselm.stores.retention import Policy
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

PYTHON = os.environ.get("FUSELM_LLAMA_SERVER")
CONTEXT = 512
TOP_K = 64
POLICY = Policy(policy="top_k", top_k=TOP_K)
BOS = {"gemma3": "tokenizer.ggml.add_bos_token=bool:false", "qwen2.5": "tokenizer.ggml.bos_token_id=int:151645"}

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PYTHON, reason="FUSELM_LLAMA_SERVER names no Python with llama-cpp-python[server]"),
]


@pytest.fixture(scope="module")
def documents(quickstart) -> list[Document]:
    rows = [row for domain in ("english", "french", "python") for row in quickstart if row["domain"] == domain]
    rows = rows[:2] + rows[60:62] + rows[120:122]
    return [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain=row["domain"], split="train", text=row["text"][:401])
        for n, row in enumerate(rows)
    ]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def llama(file: Path, port: int, *options: str) -> Iterator[subprocess.Popen]:
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", "m", "--port", str(port)]
    settings = ["--n_ctx", str(CONTEXT), "--logits_all", "true", "--n_threads", "1", "--n_threads_batch", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, *settings, *options], **quiet) as process:
        try:
            for _ in range(600):
                with socket.socket() as asked:
                    if process.poll() is not None or asked.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            yield process
        finally:
            process.kill()


def found(file: Path, port: int) -> Server:
    return find_server(f"http://127.0.0.1:{port}/v1", "m", str(file), context_length=CONTEXT, requests=2)


def captured(folder: Path, server: Server, vocabulary, documents) -> dict:
    shown = Progress(Console(file=io.StringIO()), "capture")
    recipe = Recipe(stage="capture")
    manifest.build_once(
        folder,
        recipe,
        lambda out: server_capture.capture_from_server(
            server, vocabulary, documents, out, policy=POLICY, progress=shown
        ),
    )
    return manifest.read(folder)


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "qwen2.5"])
def test_a_store_from_the_server_is_that_of_the_model_in_memory(tmp_path, real_models, documents, name):
    source, port = source_of(real_models[name]), free_port()
    options = ["--kv_overrides", BOS[name]] if name in BOS else []
    with llama(real_models[name], port, *options):
        done = captured(tmp_path / "far", found(real_models[name], port), source.vocabulary, documents)
    nats, divergence, best, own, mass = [], [], [], [], []
    for trace, document in zip(store.Store(tmp_path / "far"), documents, strict=True):
        segmentation = source.vocabulary.segment(document.text)
        (near,) = capture.trace_batch(source, [document], [segmentation], policy=POLICY)
        assert trace.tokens.tolist() == near.tokens.tolist() and trace.starts.tolist() == near.starts.tolist()
        nats.append((trace.nats, near.nats))
        own.extend(np.abs(trace.distributions.gold - near.distributions.gold))
        for i in range(len(trace.tokens)):
            far, here = (dict(zip(*d.row(i), strict=True)) for d in (trace.distributions, near.distributions))
            best.append(next(iter(far), None) == next(iter(here)))
            both = far.keys() & here.keys()
            p = np.exp([here[t] for t in both]).astype(float)
            q = np.exp([far[t] for t in both]).astype(float)
            rest, others = max(1 - p.sum(), 1e-6), max(1 - q.sum(), 1e-6)
            divergence.append(float((p * np.log(p / q)).sum() + rest * math.log(rest / others)))
            mass.append(sum(np.exp(here[t]) for t in here if t not in far))
    far, near = np.array(nats).sum(axis=0) / len(best)
    print(
        f"\n{name}: {len(best)} tokens, {len(best) / done['seconds']:.1f} tokens/s, same best {np.mean(best):.3f}, "
        f"KL {np.mean(divergence):.4f} nats, median |gold - gold| {np.median(own):.4f}, nats a token {far:.4f} and "
        f"{near:.4f}, entries here and not there hold {np.mean(mass):.4f}, unclear {done['counts']['unclear']:.4f}"
    )
    assert far == pytest.approx(near, rel=0.01)
    assert np.mean(best) > 0.9 and np.mean(divergence) < 0.02 and np.median(own) < 0.1


def test_a_server_killed_with_kill_9_loses_nothing(tmp_path, real_models, documents, monkeypatch):
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)
    file, port = real_models["smollm2"], free_port()
    vocabulary, documents = source_of(file).vocabulary, documents[:3]
    partial = tmp_path / "far.partial"
    with llama(file, port) as process:
        server = found(file, port)

        def kill() -> None:
            while not list(partial.glob(".block-*.parquet")):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(ValueError, match="run the same command again; it resumes here"):
            captured(tmp_path / "far", server, vocabulary, documents)
    with llama(file, port):
        counts = captured(tmp_path / "far", server, vocabulary, documents)["counts"]
    assert 0 < counts["resumed_documents"] < len(documents)
    assert store.Store(tmp_path / "far").documents == [d.id for d in documents]
