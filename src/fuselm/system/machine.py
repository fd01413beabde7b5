"""Find what this machine can give to fuselm now: cores that nothing else keeps busy, memory, the name of its processor.

Threads of a matrix product wait for each other, so on two cores beside a busy process one thread is faster than two.
"""

import contextlib
import ctypes
import gc
import hashlib
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS_OF_SAMPLE = 0.2  # in which the load of others is measured
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with either, the user has chosen
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
LARGE_PROCESS = 2 << 30  # bytes above which a process looks for memory to give back

_largest: int | None = None  # threads that torch had before `use_free_cores` changed it
_chosen: int | None = None  # threads that `use_free_cores` gave it


def count_usable_cores() -> int:
    """Return how many whole cores this process may use: by its affinity, and by the quota of its control groups."""
    cores, quota = len(_list_cores()), _read_quota()
    return max(1, min(cores, math.floor(quota + 1e-6) if math.isfinite(quota) else cores))


def count_free_cores() -> int:
    """Return how many of the usable cores nothing else keeps busy, at least one, from a sample of a fifth of a second.

    Processes of low priority (nice) give way, so they do not count.
    """
    if count_usable_cores() == 1:
        return 1
    began, cores, group, own = time.monotonic(), _read_busy_seconds(), _read_group_seconds(), _read_own_seconds()
    time.sleep(SECONDS_OF_SAMPLE)
    elapsed, ours = time.monotonic() - began, _read_own_seconds() - own
    free = [float(count_usable_cores())]
    if cores is not None and (now := _read_busy_seconds()) is not None:
        free.append(len(_list_cores()) - max(now - cores - ours, 0.0) / elapsed)
    if group is not None and (now := _read_group_seconds()) is not None and math.isfinite(_read_quota()):
        free.append(_read_quota() - max(now - group - ours, 0.0) / elapsed)
    return max(1, round(min(free)))


def use_free_cores() -> int:
    """Give torch as many threads as cores are free, and return how many it has now.

    What the user says stays: OMP_NUM_THREADS or MKL_NUM_THREADS as it is, `torch.set_num_threads` as the most.
    Processes that a launcher started on this machine share its cores.
    """
    global _largest, _chosen
    import torch

    now = torch.get_num_threads()
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return now
    if now != _chosen:
        _largest = now
    assert _largest is not None
    if _largest > 1:
        share = count_free_cores() // max(int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)
        _chosen = max(1, min(_largest, share))
        torch.set_num_threads(_chosen)
    return torch.get_num_threads()


def use_own_gpu() -> None:
    """Let torch take the GPU that belongs to this one of a machine's processes, where a launcher numbers them."""
    import torch

    if (number := os.environ.get("LOCAL_RANK", "")).isdecimal() and torch.cuda.is_available():
        torch.cuda.set_device(int(number) % torch.cuda.device_count())


def count_worker_threads() -> int:
    """Return how many threads to begin for work that does not go through torch: what the user says, else free cores."""
    chosen = next((value for name in THREAD_VARIABLES if (value := os.environ.get(name, "")).isdigit()), "")
    return max(int(chosen), 1) if chosen else count_free_cores()


def name_processor() -> str:
    """Return the name of the processor, for people to read."""
    for line in _read_lines(PROC / "cpuinfo"):
        if line.startswith(("model name", "Model\t", "Hardware")) and line.partition(":")[2].strip():
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def hash_processor() -> str:
    """Return what tells processors apart that compute at different speeds: name and instructions, as a hash."""
    flags = next((line for line in _read_lines(PROC / "cpuinfo") if line.startswith(("flags", "Features"))), "")
    text = " ".join([platform.system(), platform.machine(), name_processor(), *sorted(flags.partition(":")[2].split())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def has_bf16_instructions() -> bool | None:
    """Tell whether the processor multiplies bfloat16 in one instruction; None if the system does not say."""
    lines = [line for line in _read_lines(PROC / "cpuinfo") if line.startswith(("flags", "Features"))]
    if not lines:
        return None
    return bool({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"} & set(lines[0].partition(":")[2].split()))


def measure_available_memory() -> int | None:
    """Return the bytes that can be taken without swapping, as far as system and control groups tell; else None."""
    known = []
    for line in _read_lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            known.append(int(line.split()[1]) * 1024)
    for folder in _list_control_groups("memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, now = _read_number(folder / most), _read_number(folder / used)
            if limit is not None and now is not None and limit < 1 << 60:
                stat = [line.split() for line in _read_lines(folder / "memory.stat")]
                reclaimable = sum(int(count) for name, count in stat if name == "inactive_file")
                known.append(max(int(limit - now) + reclaimable, 0))
    return min(known, default=None)


def measure_peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_memory() -> None:
    """Give back memory that a stage left behind, if this process has ever had more than `LARGE_PROCESS`.

    A trainer holds itself, so its weights and moments stay until the garbage collector looks for such cycles; and the C
    library keeps small pieces of what was freed.
    """
    if measure_peak_memory() <= LARGE_PROCESS:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _list_cores() -> set[int]:
    with contextlib.suppress(AttributeError, OSError):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _read_quota() -> float:
    """Return the cores that control groups allow, infinite without a limit."""
    quotas = [math.inf]
    for folder in _list_control_groups("cpu"):
        with contextlib.suppress(ValueError, IndexError):
            most, period = (_read_text(folder / "cpu.max") or "max 0").split()  # of version 2
            quotas.append(math.inf if most == "max" else int(most) / int(period))
        most, period = _read_number(folder / "cpu.cfs_quota_us"), _read_number(folder / "cpu.cfs_period_us")
        if most is not None and period and most > 0:
            quotas.append(most / period)
    return min(quotas)


def _list_control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, of versions 1 and 2, and of those above."""
    for line in _read_lines(PROC / "self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        roots = [CGROUPS / controllers, CGROUPS / controller] if controllers else [CGROUPS, CGROUPS / "unified"]
        for root in dict.fromkeys(roots):
            folder = root / path.lstrip("/")
            while folder != root.parent and root in (folder, *folder.parents):
                if folder.is_dir():
                    yield folder
                folder = folder.parent


def _read_busy_seconds() -> float | None:
    """Return the seconds that this process's cores have worked on something that does not give way."""
    try:
        tick, cores = os.sysconf("SC_CLK_TCK"), _list_cores()
        total = 0
        for line in _read_lines(PROC / "stat"):
            name, *times = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                user, _nice, system, _idle, _wait, irq, soft, steal = map(int, (times + ["0"] * 8)[:8])
                total += user + system + irq + soft + steal
        return total / tick if total else None
    except (ValueError, OSError, AttributeError):
        return None


def _read_group_seconds() -> float | None:
    """Return the seconds of all processes of this one's control group."""
    for folder in _list_control_groups("cpu"):
        for line in _read_lines(folder / "cpu.stat"):
            if line.startswith("usage_usec"):
                return int(line.split()[1]) / 1e6
    return None


def _read_own_seconds() -> float:
    """Return the seconds of this process that count as busy."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else 0
    return time.process_time() if niceness <= 0 else 0.0


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _read_lines(path: Path) -> list[str]:
    return (_read_text(path) or "").splitlines()


def _read_number(path: Path) -> float | None:
    try:
        return float(_read_text(path) or "")
    except ValueError:
        return None
