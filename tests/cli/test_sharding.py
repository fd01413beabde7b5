"""Test sharding.py: a command learns which of several it is from its option or its scheduler."""

import pytest

from fuselm.cli import sharding
from fuselm.system import processes


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(processes, "_shard", None)
    for names in sharding.SCHEDULERS:
        for name in filter(None, names):
            monkeypatch.delenv(name, raising=False)


def find(shard: str) -> tuple[int, int]:
    sharding.join_shards(shard)
    return processes.worker_number(), processes.worker_count()


def test_without_shards_a_process_is_alone_whatever_was_asked_before():
    find("3/4")
    sharding.join_shards(None)
    assert (processes.worker_number(), processes.worker_count(), processes.is_shard()) == (0, 1, False)


def test_a_shard_is_given_or_numbered_by_slurm_or_kubernetes(monkeypatch):
    assert find("3/4") == (3, 4) and processes.is_shard()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert find("auto") == (2, 3)
    monkeypatch.setenv("JOB_COMPLETIONS", "8")
    assert find("auto") == (2, 8)
    for name, value in {"ID": "5", "MIN": "1", "COUNT": "7"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert find("auto") == (4, 7)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("1", "--shard 1: write I/N, as 0/4 for the first of four, or auto"),
        ("-1/4", "--shard -1/4: write I/N, as 0/4 for the first of four, or auto"),
        ("4/4", "--shard 4/4: shards of 4 are 0 to 3; take one of them"),
        (
            "auto",
            "--shard auto: no scheduler numbers this process (SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX); "
            "write I/N, as 0/4",
        ),
    ],
)
def test_no_such_shard_is_refused_in_a_line(shard, message):
    with pytest.raises(ValueError) as caught:
        sharding.join_shards(shard)
    assert str(caught.value) == message
