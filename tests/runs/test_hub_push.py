"""hub_push.py: the model that a run published is pushed to a stand-in for the Hub, and nothing else of the run."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hub_server import fuselm, hub  # noqa: F401

from fuselm.runs.publish import publish

NAME = "me/fused"


@pytest.fixture
def run(tmp_path, byte_level) -> Path:
    """Return a run's folder with a published model, and a file that the user put beside it."""
    folder, reported = tmp_path / "run", tmp_path / "reported"
    for made in (folder, reported):
        made.mkdir()
    (reported / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A card\n", encoding="utf-8")
    for name in ("summary.json", "report.html"):
        (reported / name).write_text(json.dumps({"version": "0.1.0"}), encoding="utf-8")
    publish(folder, reported, byte_level, key="1", folders={})
    (folder / "model" / "notes.txt").write_text("of the user's", encoding="utf-8")
    return folder


def test_a_run_is_pushed_with_its_card_and_without_files_of_the_users(hub, run, tmp_path, byte_level):
    code, out, err = fuselm(hub, tmp_path, "push", run, "--repo", NAME, "--private")
    assert (code, out) == (0, f"{hub.url}/{NAME}\n"), err
    pushed = hub.repositories["models", NAME]
    expected = {path.name: path.read_bytes() for path in byte_level.iterdir()}
    assert {name: data for name, data in pushed.files.items() if name != "README.md"} == expected
    assert pushed.files["README.md"].endswith(b"# A card\n") and pushed.private


def test_a_run_file_names_its_run(hub, run, tmp_path, byte_level):
    options = {"output": str(run), "target": str(byte_level), "sources": {"other": str(byte_level)}}
    run_file = tmp_path / "mine.yaml"
    run_file.write_text(yaml.safe_dump(options | {"corpus": {"files": ["texts.jsonl"]}}), encoding="utf-8")
    assert fuselm(hub, tmp_path, "push", run_file, "--repo", NAME)[0] == 0
    assert "config.json" in hub.repositories["models", NAME].files


def test_an_unfinished_run_or_a_damaged_model_is_not_pushed(hub, run, tmp_path):
    code, _, err = fuselm(hub, tmp_path, "push", tmp_path / "reported/none", "--repo", NAME)
    assert code == 2 and "no finished run there (it has no summary.json)" in err
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    code, _, err = fuselm(hub, tmp_path, "push", run, "--repo", NAME)
    assert code == 2 and "model.safetensors" in err
    weights.unlink()
    code, _, err = fuselm(hub, tmp_path, "push", run, "--repo", NAME)
    assert code == 2 and "has no model.safetensors; run the same command of `fuselm run` again" in err
    shutil.rmtree(run / "model")
    assert hub.repositories == {}
