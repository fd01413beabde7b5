"""Test runs with `fuse.when: load`: what is trained is what the stored way trains, and only a sample is on disk."""

import json
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import fuselm

from fuselm.runs import config, row_fusion
from fuselm.system import manifest

FUSE = {"function": "min_ce"}
SAMPLE_TOKENS = 61


@pytest.fixture(scope="module")
def both(tmp_path_factory, byte_level, sentence_piece, word_piece, texts) -> dict[str, Path]:
    """Return the folders of a run that stores fused rows and of one that makes them as it trains, on one capture."""
    folder = tmp_path_factory.mktemp("when")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_fusion, "SAMPLE_TOKENS", SAMPLE_TOKENS)
        for when in ("stage", "load"):
            run_file = tiny_run.write(
                folder / when,
                target=byte_level,
                sources={"other": sentence_piece, "words": word_piece},
                rows=tiny_run.short(texts),
                store_dir=str(folder / "stores"),
                fuse=FUSE | {"when": when},
            )
            outcome = fuselm("run", run_file, cache=folder / "cache")
            assert outcome.code == 0, outcome.err
            assert ("capture other" in outcome.stages) == (when == "stage")
    return {when: folder / when for when in ("stage", "load")}


def find(folder: Path, stage: str) -> list[Path]:
    return sorted({path for place in (folder / "out", folder.parent / "stores") for path in place.glob(stage)})


def test_the_same_model_is_trained_on_the_same_losses(both):
    weights, histories = [], []
    for folder in both.values():
        (trained,) = find(folder, "train/fused-*")
        history = json.loads((trained / "history.json").read_text())
        histories.append({name: history[name] for name in ("dev", "log")})
        weights.append(load_file(folder / "out" / "model" / "model.safetensors"))
    assert histories[0] == histories[1] and len(histories[0]["log"]) > 5
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_only_a_sample_of_rows_is_on_disk(both):
    stage, load = (tiny_run.summary(folder / "out") for folder in both.values())
    counts = [json.loads((path / "manifest.json").read_text()) for path in find(both["load"], "fuse*/*")]
    assert len(counts) == 1 and counts[0]["counts"]["documents"] < stage["corpus"]["documents"]["english/train"] * 2
    tokens = counts[0]["counts"]["tokens"]
    assert tokens < len(counts[0]["counts"]["weights"]) * (SAMPLE_TOKENS + 149)
    assert load["models"]["fused"] == stage["models"]["fused"]
    assert (
        f"when training reads; numbers are of a sample of {counts[0]['counts']['documents']} docu"
        in load["fusion"]["way"]
    )
    assert "sample" not in stage["fusion"]["way"]


@pytest.mark.parametrize("command", ["plan", "diagnose", "inspect", "report", "fidelity"])
def test_commands_that_look_at_rows_take_the_sample(both, command):
    target = both["load"] / ("run.yaml" if command in ("plan", "report") else "out")
    outcome = fuselm(command, target, cache=both["load"].parent / "cache")
    assert outcome.code == 0, outcome.err


def test_what_is_given_to_every_run_keeps_its_keys():
    assert "when" not in config.check(yaml.safe_load(MINIMAL)).fuse.model_dump()
    assert "loader_workers" not in config.check(yaml.safe_load(MINIMAL)).train.model_dump()


MINIMAL = "{output: a, target: b, sources: {c: d}, corpus: {files: [e]}}"


@pytest.mark.parametrize("method", ["cooccurrence", "statistics"])
def test_methods_that_learn_from_all_texts_are_refused(method):
    given = yaml.safe_load(MINIMAL) | {"fuse": {"when": "load"}, "align": {"method": method}}
    with pytest.raises(
        ValueError, match=rf"^fuse.when: load aligns documents as they are read, and align.method {method}"
    ):
        config.check(given)


def test_manifests_of_the_stored_way_do_not_name_a_sample(both):
    for path in find(both["stage"], "align*/*"):
        if manifest.read(path)["parameters"].get("sample_tokens"):
            assert path in find(both["load"], "align*/*")
