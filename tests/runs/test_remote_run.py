"""Keep a whole run on an object store: the same stores, numbers and model as on a disk."""

from pathlib import Path

import pytest
import tiny_run
from object_store import (  # noqa: F401
    AZURE_KEY,
    KEY,
    SECRET,
    az_address,
    az_bucket,
    gs_address,
    gs_bucket,
    s3_address,
    s3_bucket,
)
from tiny_run import fuselm, summary


def read_stores(out: Path) -> dict[str, bytes]:
    """Return every part and index of a run's stores, and its scores, by their names in the run."""
    kinds = ("part-*.parquet", "index.parquet", "documents.jsonl", "scores.json")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for kind in kinds
        for path in sorted(out.rglob(kind))
        if ".partial" not in str(path)
    }


@pytest.fixture
def run_file(tmp_path, texts, byte_level, sentence_piece) -> Path:
    sources = {"own": byte_level, "other": sentence_piece}
    return tiny_run.write(tmp_path, target=byte_level, sources=sources, rows=tiny_run.short(texts))


@pytest.mark.parametrize("bucket", ["s3_bucket", "gs_bucket", "az_bucket"])
def test_a_run_on_an_object_store_equals_one_on_a_disk(run_file, tmp_path, bucket, request):
    remote = request.getfixturevalue(bucket) / "runs" / "mine"
    outcome = fuselm("run", run_file, cache=tmp_path / "cache")
    assert outcome.code == 0, outcome.err
    outcome = fuselm("run", run_file, f"output={remote}", cache=tmp_path / "other")
    assert outcome.code == 0, outcome.err
    local = tmp_path / "out"
    assert read_stores(remote) == read_stores(local)
    assert summary(remote)["models"] == summary(local)["models"]
    assert {p.name for p in (remote / "model").iterdir()} == {p.name for p in (local / "model").iterdir()}
    again = fuselm("run", run_file, f"output={remote}", cache=tmp_path / "third")
    assert again.code == 0 and again.stages == [], again.err
    for path in remote.rglob("*"):
        data = path.read_bytes()
        assert not any(secret.encode() in data for secret in (KEY, SECRET, AZURE_KEY)), path
    assert not any(secret in outcome.err + outcome.out for secret in (KEY, SECRET, AZURE_KEY))
