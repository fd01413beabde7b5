"""Read, align and fuse stores with changed values whose checksums fit, unless they are refused."""

import copy
import struct
from pathlib import Path

import drawn
import numpy as np
from tampered import Contents, put_together, take_apart

from fuselm.alignment import aligner as alignment
from fuselm.fusion import fuse as fusion
from fuselm.fusion import tails
from fuselm.stores import store
from fuselm.system import manifest

TEXTS = ["ab é ba" * 3, "b a", "", "éé aab", "abba" * 5]
NUMBERS = [-1, 0, 1, 2, 5, 7, 2**24, 50_000_000, 2**31 - 1, -(2**31)]
FLOATS = [0.0, 1.0, -1.0, 50.0, -5000.0, float("nan"), float("inf"), float("-inf"), 1e-30, -1e-3]
SIZES = ("tokens", "starts", "gold", "tail", "counts", "ids", "logprobs", "weights")


def prepare(folder: Path):
    random = np.random.default_rng(0)
    source, target = drawn.byte_pairs([(0, 1), (2, 0)]), drawn.byte_pairs([(1, 0), (0, 0)])
    traces = [drawn.trace_of(source, t, random, top_k=3, document=f"d{n}") for n, t in enumerate(TEXTS)]
    recipe = manifest.Recipe(stage="capture", inputs={"tokenizer": "x"})
    manifest.build_once(folder, recipe, lambda out: store.write_parts(out, traces) | {"vocabulary_size": source.size})
    used(folder, source, target)  # which compiles what it calls
    return take_apart(folder), source, target


def change(contents: Contents, random: np.random.Generator) -> None:
    """Set one to three values to others; in every second case, to numbers that a row might have."""
    for _ in range(int(random.integers(1, 4))):
        row = contents.rows[int(random.integers(len(contents.rows)))]
        name = str(random.choice(list(row)))
        value = row[name]
        if isinstance(value, str):
            row[name] = str(random.choice(["", "d0", "\x1b[31m", "x" * 1000, "0" * 16]))
        elif isinstance(value, int):
            row[name] = int(random.choice(NUMBERS))
        elif isinstance(value, float):
            row[name] = float(random.choice(FLOATS))
        elif value and random.random() < 0.15:
            value.pop(int(random.integers(len(value))))
        elif random.random() < 0.1:
            value.append(0)
        elif value:
            at = int(random.integers(len(value)))
            value[at] = _other(value[at], random)


def _other(value, random: np.random.Generator):
    if isinstance(value, int):
        return int(random.choice([*NUMBERS, value + 1, value - 1]))
    return struct.unpack("f", struct.pack("f", float(random.choice([*FLOATS, value / 2, value * 2]))))[0]


def case(made, random: np.random.Generator, folder: Path) -> None:
    whole, source, target = made
    contents = copy.deepcopy(whole)
    change(contents, random)
    if random.random() < 0.8:
        contents.index_rows()
    used(put_together(contents, folder / "store"), source, target)


def used(path: Path, source, target) -> None:
    """Read a store and bring it into the target; what comes out must be distributions."""
    aligner = alignment.Aligner(source, target, method="span")
    for trace in store.Store(path, vocabulary_size=source.size):
        number = int(trace.document[1:]) if trace.document[1:].isdecimal() else 0
        aligned = aligner.align(trace, TEXTS[min(number, len(TEXTS) - 1)])
        for each in (trace, aligned):
            sums = np.bincount(
                each.distributions.rows, np.exp(each.distributions.logprobs.astype(float)), len(each.tokens)
            )
            whole = sums + each.distributions.tail  # which is rounded
            assert np.allclose(whole, 1, atol=0.01), "a row does not sum to 1"
            assert not np.isnan(each.distributions.gold).any() and each.nats >= 0, "NaN came through"
        tails.compute_entropy(aligned.distributions, target.size)
        fusion.fuse([aligned, aligned], vocabulary_size=target.size, function="avg_ce")
