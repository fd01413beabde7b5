"""Damage files of stores: flip bits, cut, lengthen, exchange them. What is read must be what was written."""

import shutil
from pathlib import Path

import numpy as np
from fuzz.targets import store_values
from rich.console import Console

from fuselm.stores import store, verification
from fuselm.system.progress import Progress

QUIET = Progress(Console(quiet=True), "")


def prepare(folder: Path):
    store_values.prepare(folder)
    return folder, [values(trace) for trace in store.Store(folder)]


def values(trace) -> tuple:
    d = trace.distributions
    arrays = (trace.tokens, trace.starts, d.ids, d.logprobs, d.gold, d.tail, d.offsets, trace.weights)
    return trace.document, trace.text, trace.size, trace.nats, *(array.tobytes() for array in arrays)


def case(made, random: np.random.Generator, folder: Path) -> None:
    whole, expected = made
    path = shutil.copytree(whole, folder / "store")
    damage(path / str(random.choice(sorted(p.name for p in path.iterdir()))), random)
    verdict = problem = None
    try:
        verdict = verification.verify_store(path, progress=QUIET)
    except ValueError as error:
        problem = error
    found = [values(trace) for trace in store.Store(path)]
    assert found == expected, "another value was read"
    assert problem is None and verdict is not None
    if verdict.problems:
        raise ValueError(str(verdict.problems[0]))


def damage(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    way = random.integers(6)
    at = int(random.integers(len(data)))
    if way == 0:
        data = data[:at]
    elif way == 1:
        data += random.bytes(int(random.integers(1, 99)))
    elif way == 2:
        data[at : at + 8] = random.bytes(8)
    elif way == 3:
        path.unlink()
        return
    else:
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    path.write_bytes(data)
