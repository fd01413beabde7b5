"""compiling.py: kernels compile wherever fuselm is installed, for any user; a damaged cache costs only time."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
from rich.console import Console

import fuselm
from fuselm.system import compiling, progress
from fuselm.system.compiling import compiled

NOBODY = 65534
# Where this is run by root, whose interpreter others may not be able to read: all that numba imports, then no rights.
DROP = f"""
import os
import numba, numpy as np
numba.njit(lambda values: values + 1)(np.arange(3.0))
from fuselm.stores import rounding  # of which nothing is compiled or written yet
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
"""
NORMALISE = """
import numpy as np
from fuselm.stores import rounding
logprobs, tail = np.log(np.array([0.25, 0.25], np.float32)), np.array([0.5], np.float32)
rows = rounding.normalise_rows(np.array([0, 2]), logprobs, tail)
print(rounding.__file__, np.exp(rows[0]).tolist(), sum(rounding._normalise.stats.cache_hits.values()))
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder that every user may read, with the package where no other user may write."""
    folder = Path(tempfile.mkdtemp(prefix="fuselm-test-"))
    folder.chmod(0o755)
    shutil.copytree(Path(fuselm.__file__).parent, folder / "package/fuselm", ignore=lambda *_: {"__pycache__"})
    for name in ("cache", "tmp"):
        (folder / name).mkdir()
    yield folder
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def run_as_nobody(folder: Path, *, writable: set[str], **changes: str) -> tuple[list[float], int]:
    """Run a kernel as a user who may write in those folders only; return its result and how often it was kept."""
    for path in (folder / "package").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for name in ("cache", "tmp"):
        (folder / name).chmod(0o777 if name in writable else 0o555)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))} | {
        "PYTHONPATH": str(folder / "package"),
        "HOME": "/nonexistent",
        "TMPDIR": str(folder / "tmp"),
        "FUSELM_CACHE": str(folder / "cache/fuselm"),
        **changes,
    }
    environment = {k: v for k, v in environment.items() if v}
    command = [sys.executable, "-c", DROP + NORMALISE]
    ended = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    file, rest = ended.stdout.split(maxsplit=1)
    assert Path(file).is_relative_to(folder)
    values, hits = rest.rsplit(maxsplit=1)
    return [float(v) for v in values.strip("[] ").split(",")], int(hits)


def kept(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob(f"*{compiling.SUFFIX}") if "_normalise" in p.name)


@pytest.mark.parametrize(
    ("writable", "place", "changes"),
    [
        ({"cache", "tmp"}, "cache", {}),
        ({"tmp"}, "tmp", {}),
        ({"tmp"}, "tmp", {"HOME": "", "FUSELM_CACHE": ""}),  # nobody has a home
    ],
)
def test_a_user_who_may_not_write_in_the_package_can_run_kernels(shared, writable, place, changes):
    assert run_as_nobody(shared, writable=writable, **changes) == (pytest.approx([0.25, 0.25]), 0)
    assert [path.relative_to(shared).parts[0] for path in kept(shared)] == [place]
    assert run_as_nobody(shared, writable=writable, **changes) == (pytest.approx([0.25, 0.25]), 1)


def test_where_nothing_can_be_written_kernels_are_compiled_each_time(monkeypatch):
    monkeypatch.setattr(compiling, "list_cache_folders", lambda: iter([]))
    assert called(doubled) == called(doubled) == 0


def test_kernels_compiled_at_installation_serve_every_user(shared):
    environment = os.environ | {"PYTHONPATH": str(shared / "package"), "NUMBA_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", NORMALISE], env=environment, check=True, capture_output=True)
    assert run_as_nobody(shared, writable=set())[1] == 1


def test_a_temporary_folder_that_others_may_write_is_not_trusted(shared):
    own = shared / "tmp" / f"fuselm-{NOBODY if os.getuid() == 0 else os.getuid()}"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    run_as_nobody(shared, writable={"tmp"})
    assert not kept(shared)


@compiled(nogil=True)
def doubled(values):
    return values * 2


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(compiling, "list_cache_folders", lambda: iter([tmp_path / "kernels"]))
    return tmp_path / "kernels"


def called(function) -> int:
    """Call a kernel as a new process would; return how often a kept version served."""
    fresh = compiled(nogil=True)(function.py_func)
    assert fresh(np.arange(5.0)).tolist() == [0, 2, 4, 6, 8]
    return sum(fresh.stats.cache_hits.values())


def test_seconds_of_compiling_and_of_reading_kernels_are_left_out_of_rates(cache):
    with progress.show_progress(Console(quiet=True), "align own") as shown:
        for hits in (0, 1):
            began, started = shown._began, time.monotonic()
            assert called(doubled) == hits
            left_out = shown._began - began
            assert 0 < left_out <= time.monotonic() - started


DAMAGES = {
    "empty": lambda data: b"",
    "short": lambda data: data[: compiling.CHECKSUM_BYTES // 2],
    "cut": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "garbage": lambda data: bytes(n * 37 % 256 for n in range(len(data))),
    "a bit flipped": lambda data: data[:999] + bytes([data[999] ^ 1]) + data[1000:],
    "a bit of the checksum flipped": lambda data: bytes([data[0] ^ 128]) + data[1:],
    "whole but no pickle": lambda data: compiling.hashlib.sha256(b"x").digest() + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_kernel_file_is_written_again_silently(cache, damage, capfd):
    assert called(doubled) == 0 and called(doubled) == 1
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert called(doubled) == 0 and called(doubled) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.parent.symlink_to("/nonexistent/x")])
def test_a_kernel_file_that_cannot_be_written_costs_only_time(cache, make, capfd):
    assert called(doubled) == 0
    (file,) = cache.iterdir()
    file.unlink()
    if make.__code__.co_names != ("mkdir",):
        cache.rmdir()
    make(file)
    assert called(doubled) == called(doubled) == 0 and capfd.readouterr() == ("", "")


def test_a_kernel_compiled_with_other_options_or_bounds_is_not_used(cache, monkeypatch):
    assert called(doubled) == 0
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "BOUNDSCHECK", 1)
        assert called(doubled) == 0
    fresh = compiled(nogil=True, fastmath=True)(doubled.py_func)
    fresh(np.arange(5.0))
    assert not fresh.stats.cache_hits


FACTOR = 3


def scaled(values):
    return doubled(values) * FACTOR


def test_a_kernel_is_compiled_again_after_a_callee_or_a_constant_changes(monkeypatch):
    def source() -> str:
        compiling.hash_source.cache_clear()
        return compiling.hash_source(scaled)

    first = source()
    assert source() == first
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert (second := source()) != first
    monkeypatch.setitem(globals(), "doubled", compiled(nogil=True)(lambda values: values * 5))
    assert source() not in (first, second)


def test_every_kernel_of_the_package_has_a_stage_that_says_how_long_it_compiles():
    package = Path(fuselm.__file__).parent
    kernels = [path for path in package.rglob("*.py") if "@compiled(" in path.read_text(encoding="utf-8")]
    modules = {".".join(path.relative_to(package).with_suffix("").parts) for path in kernels}
    assert modules == {module for of_stage in compiling.STAGES.values() for module in of_stage}
    assert compiling.STAGES.keys() == compiling.SECONDS.keys()


def test_a_stage_whose_kernels_are_kept_needs_no_seconds(cache):
    assert compiling.estimate_seconds("align") == compiling.SECONDS["align"] > 0
    cache.mkdir()
    (cache / f"fuselm.alignment.span._follow-0123{compiling.SUFFIX}").write_bytes(b"")
    assert compiling.estimate_seconds("align") == compiling.estimate_seconds("evaluate") == 0
