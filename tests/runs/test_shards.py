"""Test commands that share a run: the bytes are those of one, each part is made once, and kills cost only parts."""

from collections import Counter
from pathlib import Path

import pytest
import shards
import tiny_run
from tiny_run import fuselm

from fuselm.system import manifest

STAGES = ("corpus", "write", "capture", "align", "fuse")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Return the folder of a run that one process fused, in small parts, with its run file and log."""
    folder = tmp_path_factory.mktemp("whole")
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=tiny_run.short(texts),
        write={"ratio": {"other": 0.3}, "prompt_tokens": 3, "tokens": 13},
        fuse={"weights": "learned"},
    )
    process = shards.start("fuse", run_file, log=folder / "log")
    process.join()
    assert process.exitcode == 0
    return folder


def list_files(out: Path) -> dict[str, str]:
    """Return the hashes of all files of the stores, and what their manifests say of parts."""
    found = {}
    for stage in STAGES:
        for folder in (out / stage).iterdir():
            made = manifest.read(folder)
            found |= {f"{stage}/{folder.name}/{name}": sha256 for name, sha256 in made["files"].items()}
            counts = {name: count for name, count in made["counts"].items() if name != "resumed_documents"}
            found[f"{stage}/{folder.name}"] = str((counts, made.get("parts")))
    return found


def test_four_shards_make_the_stores_of_one_process_and_each_part_once(whole, tmp_path):
    log = tmp_path / "log"
    shards.kill_and_restart(4, "fuse", whole / "run.yaml", f"output={tmp_path / 'out'}", kills=0, log=log)
    assert list_files(tmp_path / "out") == list_files(whole / "out")
    made = [line.split() for line in log.read_text().splitlines()]
    assert max(Counter((folder, part) for folder, part, _ in made).values()) == 1
    assert len({process for _, _, process in made}) > 1
    assert len(made) == len((whole / "log").read_text().splitlines())
    assert not list((tmp_path / "out").rglob(".*"))


def test_killed_shards_cost_only_the_parts_that_they_were_making(whole, tmp_path):
    log = tmp_path / "log"
    out = f"output={tmp_path / 'out'}"
    killed = shards.kill_and_restart(4, "fuse", whole / "run.yaml", out, kills=6, log=log)
    assert killed == 6
    assert list_files(tmp_path / "out") == list_files(whole / "out")
    made = Counter(tuple(line.split()[:2]) for line in log.read_text().splitlines())
    assert max(made.values()) == 1  # what was completed is never made again


def test_a_run_whose_shards_are_done_has_nothing_to_do(whole):
    outcome = fuselm("fuse", whole / "run.yaml", "--shard", "1/2")
    assert outcome.code == 0 and outcome.stages == [] and "nothing to do" in outcome.err
