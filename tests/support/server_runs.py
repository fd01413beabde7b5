"""Write run files whose sources are servers."""

from pathlib import Path

import pytest
import tiny_run
import yaml
from captures import source_of
from model_server import NAME

from fuselm.sources import capture


@pytest.fixture(scope="module")
def plain(byte_level) -> tuple[Path, capture.LoadedSource]:
    return byte_level, source_of(byte_level)


@pytest.fixture(scope="module")
def rows(texts):
    return tiny_run.short(texts)


def run_file(folder: Path, plain, rows, url: str, **options) -> Path:
    far = {"server": url, "model": NAME, "tokenizer": str(plain[0])} | options
    sources = {"own": str(plain[0]), "far": far}
    path = tiny_run.write(
        folder, target=plain[0], sources={}, rows=rows, corpus={"files": ["corpus.jsonl"], "max_bytes": 64}
    )
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"sources": sources}))
    return path
