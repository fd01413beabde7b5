"""Test warm_up.py: after it, a usual run compiles nothing."""

import sys

import tiny_run
from numba.core.dispatcher import Dispatcher
from tiny_run import QUIET, fuselm

from fuselm.cli import warm_up
from fuselm.system import compiling


def compiled() -> set[tuple[str, str]]:
    """Return the signatures of all kernels that were compiled or loaded in this process."""
    names = [f"fuselm.{module}" for modules in compiling.STAGES.values() for module in modules]
    kernels = [value for name in names if name in sys.modules for value in vars(sys.modules[name]).values()]
    return {
        (f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}", str(signature))
        for kernel in kernels
        if isinstance(kernel, Dispatcher)
        for signature in kernel.signatures
    }


def test_a_run_on_a_machine_that_is_warm_compiles_nothing(tmp_path, byte_level, sentence_piece, texts):
    warm_up.compile_kernels(tmp_path / "warm", QUIET)
    warm = compiled()
    rows = tiny_run.short(texts)
    run_file = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level, "o": sentence_piece}, rows=rows)
    assert fuselm("train", run_file).code == 0
    assert {name.partition(".")[2] for name, _ in warm} >= {
        "models.scan._draw",
        "alignment.span._follow",
        "fusion.pooling._mix",
    }
    missing = compiled() - warm
    assert not missing, missing
