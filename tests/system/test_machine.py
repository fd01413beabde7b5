"""machine.py: how many cores and how much memory are free, from files as Linux writes them."""

import gc
import os
import time
import weakref
from pathlib import Path

import pytest
import torch

from fuselm.system import machine

TICK = os.sysconf("SC_CLK_TCK")
SAMPLE = 0.1


class System:
    """Write the files that describe a machine, with processes that keep cores busy while a sample is taken."""

    def __init__(self, folder: Path, cores: int):
        self.proc, self.groups, self.cores = folder / "proc", folder / "cgroup", cores
        self.busy: dict[int, float] = {}  # of a core, the share that others work on it
        self.nice: dict[int, float] = {}
        self.group_cores = 0.0  # that others of the control group keep busy
        self._ticks = {core: [1000.0, 100.0] for core in range(cores)}
        self._group = 5e6
        self.write("proc/self/cgroup", "0::/user.slice/job\n")
        self._stat()

    def write(self, name: str, text: str) -> None:
        path = self.proc.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def sleep(self, seconds: float) -> None:
        began = time.monotonic()
        time.sleep(seconds)
        seconds = time.monotonic() - began
        for core in range(self.cores):
            self._ticks[core][0] += self.busy.get(core, 0.0) * seconds * TICK
            self._ticks[core][1] += self.nice.get(core, 0.0) * seconds * TICK
        self._group += self.group_cores * seconds * 1e6
        self._stat()

    def _stat(self) -> None:
        lines = [f"cpu{c} {u:.0f} {n:.0f} 50 9999 10 0 5 0 0 0" for c, (u, n) in self._ticks.items()]
        self.write("proc/stat", "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 1"]) + "\n")
        self.write("cgroup/user.slice/job/cpu.stat", f"usage_usec {self._group:.0f}\nuser_usec 1\n")


@pytest.fixture
def system(tmp_path, monkeypatch):
    made = System(tmp_path, 5)
    monkeypatch.setattr(machine, "PROC", made.proc)
    monkeypatch.setattr(machine, "CGROUPS", made.groups)
    monkeypatch.setattr(machine, "SECONDS_OF_SAMPLE", SAMPLE)
    monkeypatch.setattr(machine, "_list_cores", lambda: set(range(made.cores)))
    monkeypatch.setattr(machine, "_read_own_seconds", lambda: 0.0)
    clock = type("Clock", (), {"sleep": made.sleep, "monotonic": time.monotonic, "process_time": time.process_time})
    monkeypatch.setattr(machine, "time", clock)
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return made


@pytest.fixture
def threads(monkeypatch):
    """Restore torch's threads after the test."""
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "_largest", None)
    monkeypatch.setattr(machine, "_chosen", None)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("file", "text", "cores"),
    [
        ("cgroup/user.slice/job/cpu.max", "max 100000", 5),
        ("cgroup/user.slice/job/cpu.max", "200000 100000", 2),
        ("cgroup/user.slice/job/cpu.max", "50000 100000", 1),
        ("cgroup/user.slice/job/cpu.max", "290000 100000", 2),
        ("cgroup/user.slice/cpu.max", "300000 100000", 3),  # of a group above
        ("cgroup/cpu.max", "garbage", 5),
        ("cgroup/cpu.max", "", 5),
    ],
)
def test_a_quota_of_version_2_leaves_whole_cores(system, file, text, cores):
    system.write(file, text)
    assert machine.count_usable_cores() == machine.count_free_cores() == cores


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "cores"), [(-1, 5), (150_000, 1), (400_000, 4)])
def test_a_quota_of_version_1_leaves_whole_cores(system, controllers, quota, cores):
    system.write("proc/self/cgroup", f"9:memory:/other\n2:{controllers}:/docker/abc\n0::/\n")
    system.write(f"cgroup/{controllers}/docker/abc/cpu.cfs_quota_us", f"{quota}\n")
    system.write(f"cgroup/{controllers}/docker/abc/cpu.cfs_period_us", "100000\n")
    assert machine.count_usable_cores() == cores


@pytest.mark.parametrize(
    ("busy", "nice", "free"),
    [
        ({}, {}, 5),
        ({1: 1.0}, {}, 4),
        ({0: 0.6, 1: 0.6, 2: 0.8}, {}, 3),
        ({n: 1.0 for n in range(5)}, {}, 1),
        ({7: 1.0}, {}, 5),  # a core that is not this process's
        ({}, {n: 1.0 for n in range(5)}, 5),  # gives way
        ({4: 0.2}, {}, 5),
    ],
)
def test_cores_that_others_keep_busy_are_not_free(system, busy, nice, free):
    system.busy, system.nice = busy, nice
    assert machine.count_free_cores() == free


def test_another_process_under_the_same_quota_leaves_fewer_cores(system):
    system.write("cgroup/user.slice/job/cpu.max", "400000 100000")
    system.group_cores = 1.0
    assert machine.count_usable_cores() == 4 and machine.count_free_cores() == 3


def test_work_of_this_process_does_not_count_as_busy(system, monkeypatch):
    system.busy = {0: 1.0, 1: 1.0, 2: 1.0}
    own = iter([0.0, 2 * SAMPLE])
    monkeypatch.setattr(machine, "_read_own_seconds", lambda: next(own))
    assert machine.count_free_cores() == 4


def test_all_cores_count_as_free_without_system_files(tmp_path, system, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path / "none")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "none")
    assert machine.count_free_cores() == machine.count_usable_cores() == 5
    assert machine.measure_available_memory() is None and machine.name_processor()


def test_torch_gets_the_free_cores_as_they_change(system, threads):
    torch.set_num_threads(4)
    system.busy = {0: 1.0, 1: 1.0, 2: 1.0}
    assert machine.use_free_cores() == torch.get_num_threads() == 2
    system.busy = {}
    assert machine.use_free_cores() == torch.get_num_threads() == 4


def test_a_number_of_threads_that_the_user_chose_is_kept(system, threads, monkeypatch):
    system.busy = {0: 1.0, 1: 1.0}
    torch.set_num_threads(4)
    machine.use_free_cores()
    torch.set_num_threads(2)  # by the user, in between
    system.busy = {}
    assert machine.use_free_cores() == 2
    system.busy = {n: 1.0 for n in range(5)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert machine.use_free_cores() == machine.count_worker_threads() == 3


def test_processes_of_a_launcher_share_the_cores(system, threads, monkeypatch):
    torch.set_num_threads(5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.use_free_cores() == 2


def test_available_memory_is_the_least_that_system_and_groups_leave(system):
    system.write("proc/meminfo", "MemTotal: 900 kB\nMemAvailable: 700 kB\n")
    assert machine.measure_available_memory() == 700 * 1024
    system.write("cgroup/user.slice/memory.max", "500000")
    system.write("cgroup/user.slice/memory.current", "400000")
    system.write("cgroup/user.slice/memory.stat", "anon 1\ninactive_file 50000\n")
    assert machine.measure_available_memory() == 150_000
    system.write("cgroup/user.slice/job/memory.max", "max")
    system.write("cgroup/user.slice/job/memory.current", "1")
    assert machine.measure_available_memory() == 150_000


def test_processors_with_other_instructions_have_other_keys(system):
    keys = set()
    for flags in ("fpu avx2", "fpu avx2 avx512_bf16", "avx2 fpu"):
        system.write("proc/cpuinfo", f"model name\t: Some CPU\nflags\t\t: {flags}\n\nmodel name\t: Some CPU\n")
        keys.add(machine.hash_processor())
    assert len(keys) == 2 and machine.name_processor() == "Some CPU"


@pytest.mark.parametrize(("large", "is_kept"), [(0, False), (1 << 60, True)])
def test_a_large_process_gives_back_what_holds_itself(large, is_kept, monkeypatch):
    class Trainer:
        pass

    monkeypatch.setattr(machine, "LARGE_PROCESS", large)
    gc.collect()
    gc.disable()
    try:
        trainer = Trainer()
        trainer.own, found = trainer, weakref.ref(trainer)
        del trainer
        machine.release_memory()
        assert (found() is not None) is is_kept
    finally:
        gc.enable()


def test_peak_memory_is_in_bytes():
    assert 50 << 20 < machine.measure_peak_memory() < 1 << 40
