"""Read logits once, on a CPU, and then only the few blocks of columns that matter.

The first pass finds each row's log-sum-exp, and each block's largest logit and mass. Later passes find the entries
above a bound, and draw from all others. The code is compiled for float32, and for bfloat16 as matrix products give it.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import ndarray
from torch import Tensor

from fuselm.system import index_checks
from fuselm.system.compiling import compiled

BLOCK = 64  # columns
SUMS = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered and joined with products; NaN stays NaN
# These coefficients give 2**f for f in [0, 1) to 1e-7 of it; the first is that of f**5.
POWER = tuple(
    np.float32(c) for c in (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)
)
LOG2_E = np.float32(math.log2(math.e))
LOWEST = np.int32(-(2**31))
INT32 = ir.IntType(32)
LEAST = np.float32(-126)  # smaller powers count as 2**-126
SLIVER = 0.1  # a tail with a smaller part of a draw's share is not drawn from
MORE = 3  # a row may have so many more entries than draws: the largest, the gold one, and one of a sliver


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Hold what is known of rows before single entries are searched for."""

    log_z: Float[Tensor, "rows"]  # log-sum-exp
    maxima: Float[Tensor, "rows blocks"]  # of each block of columns; the last may be shorter
    sums: Float[Tensor, "rows blocks"] | None = None  # of exp(logit - the row's largest), if compiled


def can_read(logits: Tensor) -> bool:
    """Tell whether the functions here can read logits: they lie on a CPU, row after row, and have a known type."""
    known = logits.dtype in (torch.float32, torch.bfloat16)
    return logits.device.type == "cpu" and known and logits.is_contiguous() and not logits.requires_grad


def survey_logits(logits: Float[Tensor, "rows vocab"]) -> Survey:
    """Survey all rows in one pass."""
    rows, vocab = logits.shape
    maxima, sums = np.empty((2, rows, -(-vocab // BLOCK)), np.float32)
    log_z = np.empty(rows, np.float32)
    _run_in_threads(_survey, _view_raw(logits), maxima, sums, log_z)
    return Survey(log_z=torch.from_numpy(log_z), maxima=torch.from_numpy(maxima), sums=torch.from_numpy(sums))


def find_above(
    logits: Float[Tensor, "rows vocab"], maxima: Float[Tensor, "rows blocks"], bound: Float[Tensor, "rows"]
) -> tuple[Int[ndarray, "rows"], Int[ndarray, "entries"], Float[ndarray, "entries"]]:
    """Find the entries of each row that are at least its bound: their counts, ids (ascending in a row) and values."""
    raw, largest, bounds = _view_raw(logits), maxima.numpy(), bound.float().numpy()
    _require_survey(raw, largest)
    index_checks.require_lengths("bounds", len(raw), bounds)
    counts = np.empty(len(raw), np.int64)
    _run_in_threads(_count, raw, largest, bounds, counts)
    begins = np.cumsum(counts) - counts
    ids, values = np.empty(counts.sum(), np.int32), np.empty(counts.sum(), np.float32)
    _fill(raw, largest, bounds, begins, ids, values)
    return counts, ids, values


def draw_entries(
    logits: Float[Tensor, "rows vocab"],
    found: Survey,
    gold: Int[Tensor, "rows"],
    uniform: Float[ndarray, "rows"],
    draws: int,
) -> tuple[Int[ndarray, "rows"], Int[ndarray, "entries"], Float[ndarray, "entries"], Float[ndarray, "rows"]]:
    """Keep the entries of at least 1/`draws`, the largest and the gold one, and draw from the others.

    Draws are systematic, one for each whole 1/`draws` of the others' mass. Returns counts of entries by row, ids
    (ascending in a row), log-probabilities (-inf for drawn entries), and the mass of the others by row.
    """
    raw, room = _view_raw(logits), draws + MORE
    counts, tail = np.empty(len(raw), np.int64), np.empty(len(raw), np.float32)
    ids, logprobs = np.empty((len(raw), room), np.int32), np.empty((len(raw), room), np.float32)
    known = (found.maxima.numpy(), found.sums.numpy(), found.log_z.numpy())
    _require_survey(raw, *known[:2])
    index_checks.require_lengths("rows", len(raw), known[2], gold.numpy(), uniform)
    index_checks.require_within("a gold id", gold.numpy(), raw.shape[1])
    _run_in_threads(_draw, raw, *known, gold.numpy(), uniform, counts, ids, logprobs, tail)
    real = np.arange(room) < counts[:, None]
    return counts, ids[real], logprobs[real], tail


def _require_survey(raw: ndarray, *blocks: ndarray) -> None:
    """Raise `ValueError` unless `blocks` have one number for each row and block of columns of `raw`."""
    shape = len(raw), -(-raw.shape[1] // BLOCK)
    for numbers in blocks:
        if numbers.shape != shape:
            raise ValueError(f"a survey of {numbers.shape} blocks, these logits have {shape}")


def _view_raw(logits: Float[Tensor, "rows vocab"]) -> ndarray:
    """Return logits as an array, bfloat16 as its bits, because numpy does not know it."""
    return (logits.view(torch.int16) if logits.dtype == torch.bfloat16 else logits).numpy()


def _run_in_threads(kernel: Callable[..., None], *arrays: Any) -> None:
    """Run a kernel on slices of the rows, one for each thread that torch has."""
    rows, threads = len(arrays[0]), torch.get_num_threads()
    edges = np.linspace(0, rows, min(threads, rows) + 1).astype(int)
    parts = [[array[begin:end] for array in arrays] for begin, end in itertools.pairwise(edges)]
    if len(parts) < 2:
        kernel(*arrays)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(kernel, *part) for part in parts]:
            done.result()


@intrinsic
@no_type_check
def _bits(_context, value):
    """Return the bits of the float32 that a value of `_view_raw` stands for, in an int32."""

    def generate_code(_context, builder, signature, arguments):
        if value == types.float32:
            return builder.bitcast(arguments[0], INT32)
        return builder.shl(builder.zext(arguments[0], INT32), INT32(16))

    return types.int32(value), generate_code


@intrinsic
@no_type_check
def _float(_context, bits):
    """Return the float32 of such bits."""
    return types.float32(bits), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
@no_type_check
def _ordered(_context, bits):
    """Turn bits into integers that have the order of their floats, and back. NaN lies at either end."""

    def generate_code(_context, builder, signature, arguments):
        negative = builder.and_(builder.ashr(arguments[0], INT32(31)), INT32(0x7FFFFFFF))
        return builder.xor(arguments[0], negative)

    return types.int32(bits), generate_code


@compiled(fastmath=SUMS)
@no_type_check
def _power(exponent):
    """Return 2**exponent, for an exponent up to 127."""
    exponent = LEAST if exponent < LEAST else exponent
    whole = np.floor(exponent)
    f = exponent - whole
    a, b, c, d, e, g = POWER
    bits = np.int32((np.int32(whole) + 127) << 23)
    return (((((a * f + b) * f + c) * f + d) * f + e) * f + g) * _float(bits)


@compiled(nogil=True, fastmath=SUMS)
@no_type_check
def _survey(raw, maxima, sums, log_z):
    vocab = raw.shape[1]
    whole = vocab // BLOCK * BLOCK
    for i in range(len(raw)):
        largest = LOWEST
        for block in range(whole // BLOCK):  # a constant length compiles to better code
            most = LOWEST
            for j in range(block * BLOCK, (block + 1) * BLOCK):
                value = _ordered(_bits(raw[i, j]))
                most = value if value > most else most
            maxima[i, block] = _float(_ordered(most))
            largest = most if most > largest else largest
        if whole < vocab:
            most = LOWEST
            for j in range(whole, vocab):
                value = _ordered(_bits(raw[i, j]))
                most = value if value > most else most
            maxima[i, whole // BLOCK] = _float(_ordered(most))
            largest = most if most > largest else largest
        top = _float(_ordered(largest))
        if not np.isfinite(top):
            log_z[i] = top
            sums[i] = np.nan
            for j in range(vocab):
                if np.isnan(_float(_bits(raw[i, j]))):
                    log_z[i] = np.nan
            continue
        total = 0.0
        for block in range(whole // BLOCK):
            part = np.float32(0)
            for j in range(block * BLOCK, (block + 1) * BLOCK):
                part += _power((_float(_bits(raw[i, j])) - top) * LOG2_E)
            sums[i, block] = part
            total += part
        if whole < vocab:
            part = np.float32(0)
            for j in range(whole, vocab):
                part += _power((_float(_bits(raw[i, j])) - top) * LOG2_E)
            sums[i, whole // BLOCK] = part
            total += part
        log_z[i] = math.log(total) + top


@compiled(nogil=True)
@no_type_check
def _count(raw, maxima, bound, counts):
    for i in range(len(raw)):
        counts[i] = 0
        for block in range(maxima.shape[1]):
            if maxima[i, block] >= bound[i]:
                for j in range(block * BLOCK, min((block + 1) * BLOCK, raw.shape[1])):
                    counts[i] += _float(_bits(raw[i, j])) >= bound[i]


@compiled(nogil=True)
@no_type_check
def _fill(raw, maxima, bound, begins, ids, values):
    for i in range(len(raw)):
        at = begins[i]
        for block in range(maxima.shape[1]):
            if maxima[i, block] >= bound[i]:
                for j in range(block * BLOCK, min((block + 1) * BLOCK, raw.shape[1])):
                    value = _float(_bits(raw[i, j]))
                    if value >= bound[i]:
                        ids[at], values[at] = j, value
                        at += 1


@compiled(nogil=True)
@no_type_check
def _draw(raw, maxima, sums, log_z, gold, uniform, counts, ids, logprobs, tail):
    vocab, draws = raw.shape[1], ids.shape[1] - MORE
    rest = np.empty(maxima.shape[1])
    for i in range(len(raw)):
        counts[i], tail[i] = 0, 1.0
        if not np.isfinite(log_z[i]):
            continue
        top, bound = maxima[i].max(), np.float32(log_z[i] - math.log(draws))
        largest = -1  # where it is, if it is below the bound
        if top < bound:
            block = maxima[i].argmax()
            for j in range(block * BLOCK, min((block + 1) * BLOCK, vocab)):
                if largest < 0 and _float(_bits(raw[i, j])) == top:
                    largest = j
        total = 0.0
        for block in range(len(rest)):
            rest[block] = sums[i, block]
            if maxima[i, block] >= bound or block == largest // BLOCK or block == gold[i] // BLOCK:
                rest[block] = 0.0
                for j in range(block * BLOCK, min((block + 1) * BLOCK, vocab)):
                    value = _float(_bits(raw[i, j]))
                    if value < bound and j != largest and j != gold[i]:
                        rest[block] += _power((value - top) * LOG2_E)
            total += rest[block]
        tail[i] = min(total * math.exp(top - log_z[i]), 1.0)
        times = math.floor(tail[i] * draws)
        if times == 0 and tail[i] * draws >= SLIVER:
            times = 1
        n = drawn = 0
        place = uniform[i] * total / times if times else np.inf
        before = 0.0
        for block in range(len(rest)):
            kept = maxima[i, block] >= bound or block == largest // BLOCK or block == gold[i] // BLOCK
            if kept or before + rest[block] > place:
                sum_ = before
                for j in range(block * BLOCK, min((block + 1) * BLOCK, vocab)):
                    value = _float(_bits(raw[i, j]))
                    if value >= bound or j == largest or j == gold[i]:
                        ids[i, n], logprobs[i, n] = j, min(value - log_z[i], np.float32(0))
                        n += 1
                        continue
                    sum_ += _power((value - top) * LOG2_E)
                    if sum_ > place:
                        ids[i, n], logprobs[i, n] = j, -np.inf
                        n += 1
                        drawn += 1
                        place = (uniform[i] + drawn) * total / times if drawn < times else np.inf
            before += rest[block]
        counts[i] = n
