"""A run of conversations with a source that is served by another process, which is asked with its template's ids."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import chat_models
import numpy as np
import pytest
import tiny_run
import yaml
from model_server import NAME

from fuselm.stores.store import Store

SERVE = """
import sys
from pathlib import Path
from captures import source_of
from model_server import ModelServer
folder = Path(sys.argv[1])
with ModelServer("vllm", source_of(folder), folder) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(sentence_piece, tmp_path) -> Path:
    return chat_models.add_template(sentence_piece, tmp_path / "other", chat_models.BRACKETS)


@pytest.fixture
def url(folder) -> Iterator[str]:
    """Serve a model as vLLM does, in a process of its own."""
    asked = [sys.executable, "-c", SERVE, str(folder)]
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()


def test_a_served_source_is_captured_as_it_would_be_here(folder, url, byte_level, texts, tmp_path):
    target, rows = chat_models.add_template(byte_level, tmp_path / "target"), chat_models.make_rows(texts)
    far = {"server": url, "model": NAME, "tokenizer": str(folder), "system": "Speak."}
    stores = []
    for name, source in (("far", far), ("here", {"model": str(folder), "system": "Speak.", "dtype": "float32"})):
        capture = {"policy": "top_k", "top_k": 7, "prefix_tokens": 0}
        train = tiny_run.TRAIN | {"passes": 1, "average": False}
        file = tiny_run.write(tmp_path / name, target=target, sources={}, rows=rows, capture=capture, train=train)
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"sources": {"other": source}}))
        outcome = tiny_run.fuselm("run" if name == "far" else "capture", file)
        assert outcome.code == 0, outcome.err
        stores.append(Store(next((tmp_path / name / "out" / "capture").glob("other-*"))))
    far_traces, own_traces = (list(store) for store in stores)
    assert len(far_traces) == len(own_traces) > 0
    for far_trace, own in zip(far_traces, own_traces, strict=True):
        assert far_trace.document == own.document and np.array_equal(far_trace.tokens, own.tokens)
        assert np.allclose(far_trace.distributions.gold, own.distributions.gold, atol=2e-3)  # as rounded on disk
    assert (tmp_path / "far" / "out" / "run.json").is_file()
