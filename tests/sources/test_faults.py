"""Test captures against real faults of disks and processes: none loses a document, or has one twice or wrong.

The faults of servers and networks are in test_servers.py, NaN in test_capture.py, a second process in test_pipeline.py
and test_manifest.py; docs/store.md has them all in one table.
"""

import contextlib
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from captures import Interrupted, captured, documents, source_of  # noqa: F401
from same_stores import assert_same, contents  # noqa: F401
from tiny_run import fuselm

from fuselm.runs import plan
from fuselm.sources import capture, resumable_writing
from fuselm.stores import store
from fuselm.system.progress import Progress


@pytest.fixture(autouse=True)
def a_block_each_batch(monkeypatch):
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)


@pytest.fixture
def source(byte_level) -> capture.LoadedSource:
    return source_of(byte_level)


@pytest.fixture
def whole(tmp_path, source, documents) -> Path:
    """Return an undisturbed capture, in windows of a few documents."""
    captured(tmp_path / "whole", source, documents)
    return tmp_path / "whole"


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(resumable_writing, "WINDOW_TOKENS", 997)
    monkeypatch.setattr(resumable_writing, "WINDOW_BATCHES", 0)


def mount(*arguments: object) -> None:
    """Skip the test where this cannot be done."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_nothing_that_was_written(disk, windows, whole, source, documents):
    with pytest.raises(
        OSError, match=r"No space left on device: '.*/store\.partial(/\.?(block|part|claim|fragment|worker)-.*)?'$"
    ):
        captured(disk / "store", source, documents)
    assert not list(disk.rglob("*.tmp"))
    mount("-o", "remount,size=2m", disk)
    counts = captured(disk / "store", source, documents)["counts"]
    assert counts["resumed_documents"] > 0
    assert_same(disk / "store", whole)


def test_a_disk_that_fills_up_while_training_costs_nothing(disk, tmp_path, byte_level, texts, monkeypatch):
    """Fill the disk at each file: a checkpoint's weights and moments, the product, and its copies."""
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"own": byte_level},
        rows=tiny_run.short(texts),
        train=tiny_run.TRAIN | {"passes": 1},
    )
    monkeypatch.setattr(plan, "check_disk", lambda *_: None)
    cache, out = tmp_path / "cache", disk / "out"
    mount("-o", "remount,size=8m", disk)
    assert fuselm("fuse", run_file, f"output={out}", cache=cache).code == 0
    failed, room = 0, shutil.disk_usage(disk).used >> 10
    while failed < 99:
        room += 97
        mount("-o", f"remount,size={room}k", disk)
        outcome = fuselm("run", run_file, f"output={out}", cache=cache)
        if outcome.code == 0:
            break
        failed += 1
        said = outcome.err.splitlines()[-1]
        assert outcome.code == 2 and said.startswith(f"fuselm: {out}"), said
        assert said.endswith(": No space left on device; fix this and run the same command again; it resumes here")
    assert failed > 5
    assert fuselm("run", run_file, cache=cache).code == 0
    assert tiny_run.summary(out)["models"] == tiny_run.summary(tmp_path / "out")["models"]


def test_too_little_disk_space_is_reported_in_a_line_before_any_work(disk, tmp_path, byte_level, texts):
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))
    outcome = fuselm("capture", run_file, f"output={disk / 'out'}")
    assert outcome.code == 2 and outcome.stages == ["corpus"]
    assert outcome.err.splitlines()[-1].startswith(f"fuselm: {disk}/out: 0.00 GiB free, but the run may need 0.")


def test_a_file_larger_than_allowed_costs_nothing_that_was_written(tmp_path, whole, source, documents):
    part = store.part_path(whole, 0).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (part - 1, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*part-00000\.parquet'$"):
            captured(tmp_path / "store", source, documents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    counts = captured(tmp_path / "store", source, documents)["counts"]
    assert counts["resumed_documents"] == len(documents)
    assert_same(tmp_path / "store", whole)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    if os.geteuid():
        folder.chmod(0o555)
    else:  # whom modes don't stop
        mount("--bind", folder, folder)
        mount("-o", "remount,bind,ro", folder)
    try:
        yield
    finally:
        if os.geteuid():
            folder.chmod(0o755)
        else:
            subprocess.run(["umount", folder], check=True)


def test_a_folder_that_turns_read_only_costs_nothing_that_was_written(tmp_path, windows, whole, source, documents):
    with pytest.raises(Interrupted):
        captured(tmp_path / "store", source, documents, stop_after=3)
    with (
        read_only(tmp_path / "store.partial"),
        pytest.raises(OSError, match=r"Read-only file system|Permission denied"),
    ):
        captured(tmp_path / "store", source, documents)
    counts = captured(tmp_path / "store", source, documents)["counts"]
    assert counts["resumed_documents"] > 0
    assert_same(tmp_path / "store", whole)


def test_a_read_only_folder_is_reported_in_a_line_before_any_work(tmp_path, byte_level, texts):
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))
    (tmp_path / "out").mkdir()
    with read_only(tmp_path / "out"):
        outcome = fuselm("capture", run_file)
    assert outcome.code == 2 and outcome.stages == []
    assert outcome.err.splitlines()[-1].startswith(f"fuselm: {tmp_path}/out: cannot write there (")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 16
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_off, flipped, emptied])
@pytest.mark.parametrize("pattern", ["part-00000.parquet", ".block-*.parquet"])
def test_parts_damaged_during_an_interruption_are_read_again(
    tmp_path,
    windows,
    whole,
    source,
    documents,
    damage,
    pattern,
):
    with pytest.raises(Interrupted):
        captured(tmp_path / "store", source, documents, stop_after=4)
    while not (damaged := sorted((tmp_path / "store.partial").glob(pattern))):
        with pytest.raises(Interrupted):  # a part is written while the next one is read, so it may come later
            captured(tmp_path / "store", source, documents, stop_after=1)
    damage(damaged[0])
    captured(tmp_path / "store", source, documents)
    assert_same(tmp_path / "store", whole)


def test_any_flipped_bit_of_an_index_is_found_or_does_no_harm(whole, documents):
    path = whole / store.INDEX
    data, names = path.read_bytes(), {d.id for d in documents}
    expected = {trace.document: trace.distributions.ids.tolist() for trace in store.Store(whole)}
    found = 0
    for position in np.random.default_rng(0).choice(len(data), 307, replace=False):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            read = {trace.document: trace.distributions.ids.tolist() for trace in store.Store(whole)}
        except ValueError as error:
            assert str(whole) in str(error) and "\n" not in str(error)
            found += 1
        else:
            assert read == expected and read.keys() == names, position
    assert found > 200


def test_a_capture_killed_at_random_moments_ends_in_the_same_bytes(tmp_path, byte_level, quickstart):
    """Kill a capture a few times; benchmarks/kills.py does this 200 times."""
    rows = [{"domain": row["domain"], "text": row["text"][:307]} for row in quickstart[::5]]
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=rows)
    files = tiny_run.capture_watched(run_file, tmp_path / "whole")
    assert tiny_run.kill(run_file, tmp_path / "cut", kills=8, files=files) >= 4
    whole, cut = (next((tmp_path / name / "capture").glob("own-*")) for name in ("whole", "cut"))
    assert_same(cut, whole)


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_file_larger_than_allowed_in_training_is_one_line_and_costs_nothing(tmp_path, byte_level, texts, share):
    """Fail in a checkpoint's weights or its moments, by the share of the largest file that is allowed."""
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"own": byte_level},
        rows=tiny_run.short(texts),
        train=tiny_run.TRAIN | {"passes": 1},
    )
    assert fuselm("fuse", run_file).code == 0
    moments = 2 * 4 * sum(file.stat().st_size for file in byte_level.glob("*.safetensors")) // 4
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(moments * share), before[1]))
    try:
        outcome = fuselm("train", run_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = outcome.err.splitlines()[-1]
    assert outcome.code == 2 and said.startswith(f"fuselm: {tmp_path}/out/train/"), outcome.err
    assert said.endswith(": File too large; fix this and run the same command again; it resumes here")
    assert fuselm("run", run_file).code == 0


def test_a_stage_folder_that_is_deleted_while_it_is_made_is_one_line(tmp_path, byte_level, texts, monkeypatch):
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))
    advance = Progress.advance
    for stage in ("corpus", "capture", "align", "train"):

        def delete_and_advance(*arguments, stage=stage):
            for path in (tmp_path / "out").glob(f"{stage}/*.partial"):
                shutil.rmtree(path.rename(tmp_path / "gone"))  # at once, whatever is written meanwhile
            advance(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "advance", delete_and_advance)
            outcome = fuselm("capture" if stage == "corpus" else stage, run_file)
        said = outcome.err.splitlines()[-1]
        assert outcome.code == 2 and said.startswith(f"fuselm: {tmp_path}/out/{stage}/"), outcome.err
        assert said.endswith(": No such file or directory; fix this and run the same command again; it resumes here")
        assert "Traceback" not in outcome.err and outcome.out == ""
        assert stage == "corpus" or fuselm(stage, run_file).code == 0
