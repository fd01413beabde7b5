"""Call functions with compiled code on arrays of random numbers and lengths: each is refused on entry, or fits.

Bounds are checked inside, so an index that a door let through is an IndexError, which counts as a failure.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import drawn
import numpy as np
import torch

from fuselm.alignment import mined, nearest, span, spelling
from fuselm.fusion import pooling, weights
from fuselm.models import scan
from fuselm.stores import rounding
from fuselm.stores.distributions import Distributions
from fuselm.stores.rows import Trace, TrainingRows
from fuselm.training import batches

NUMBERS = np.array([-(2**31), -1, 0, 1, 2, 3, 5, 8, 9, 10, 11, 50_000_000, 2**31 - 1])


def prepare(folder: Path):
    source, target = drawn.byte_pairs([(0, 1), (2, 0)]), drawn.byte_pairs([(1, 0), (0, 0)])
    pieces = drawn.word_pieces(["ab", "##ba"])
    made = [
        (source, target, spelling.spell_vocabulary(source, target)),
        (source, pieces, spelling.spell_vocabulary(source, pieces)),
    ]
    for kernel in KERNELS:  # compiles what each calls, which a slow machine takes longer for than a case may
        for seed in range(12):
            with contextlib.suppress(ValueError):
                case(made, np.random.default_rng(seed), folder, kernel=kernel)
    return made


def case(made, random: np.random.Generator, folder: Path, *, kernel=None) -> None:
    with np.errstate(all="ignore"):
        (kernel or KERNELS[int(random.integers(len(KERNELS)))])(made, random)


def _span(made, random: np.random.Generator) -> None:
    source, target, spelled = made[int(random.integers(len(made)))]
    text = "".join(random.choice(list(drawn.ALPHABET), int(random.integers(12))))
    trace = drawn.trace_of(source, text, random, top_k=int(random.integers(1, 5)))
    rows = trace.distributions
    arrays = {
        **{name: _hurt(getattr(trace, name), random) for name in ("tokens", "starts")},
        **{name: _hurt(getattr(rows, name), random) for name in ("ids", "logprobs", "gold", "tail", "offsets")},
    }
    hurt = Trace(
        document="d",
        size=trace.size,
        nats=1.0,
        tokens=arrays.pop("tokens"),
        starts=arrays.pop("starts"),
        distributions=Distributions(**arrays),
        weights=trace.weights,
    )
    cut = target.segment(text)
    cut = replace(cut, ids=_hurt(cut.ids, random), starts=_hurt(cut.starts, random))
    if len(cut.ids) != len(cut.starts):
        return
    span.follow_text(source, target, spelled, hurt, cut, text.encode(), 4)


def _hurt(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the array in most cases, otherwise one with another number or another length."""
    chance = random.random()
    if chance < 0.85:
        return array
    array = array.copy()
    if chance < 0.95 and len(array):
        infinite = array.dtype.kind == "f" and random.random() < 0.5
        array[random.integers(len(array))] = np.nan if infinite else random.choice(NUMBERS)
        return array
    return array[:-1] if random.random() < 0.5 else np.append(array, array[:1])


def _rows(random: np.random.Generator, tokens: int) -> Distributions:
    counts = random.integers(0, 5, tokens)
    entries = int(counts.sum())
    return Distributions(
        offsets=_hurt(np.append(0, np.cumsum(counts)).astype(np.int64), random),
        ids=_hurt(random.integers(0, 99, entries).astype(np.int32), random),
        logprobs=_hurt(-random.random(entries).astype(np.float32), random),
        gold=_hurt(-random.random(tokens).astype(np.float32), random),
        tail=_hurt(random.random(tokens).astype(np.float32), random),
    )


def _rounding(made, random: np.random.Generator) -> None:
    d = _rows(random, int(random.integers(0, 7)))
    rounding.sort_rows_by_id(d.offsets, d.ids, d.logprobs)
    rounding.restore_rows(d.offsets, d.ids, d.logprobs, d.tail)


def _pooling(made, random: np.random.Generator) -> None:
    tokens, sources = int(random.integers(1, 7)), int(random.integers(1, 4))
    rows = [_rows(random, tokens) for _ in range(sources)]
    given = np.where(random.random((tokens, sources)) < 0.2, 0.0, random.random((tokens, sources)))
    pooling.pool_arithmetic(rows, given)
    pooling.pool_geometric([replace(d, tail=np.clip(d.tail, 0.1, 1.0)) for d in rows], given, 99)


def _batches(made, random: np.random.Generator) -> None:
    rows = [_rows(random, int(random.integers(1, 5))) for _ in range(3)]
    flat = [
        TrainingRows(
            tokens=np.zeros(len(d.tail), np.int32), offsets=d.offsets, ids=d.ids, logprobs=d.logprobs, tail=d.tail
        )
        for d in rows
    ]
    batches._pad_rows(flat)


def _weights(made, random: np.random.Generator) -> None:
    tokens, sources = int(random.integers(1, 7)), int(random.integers(1, 4))
    text = made[0][0].segment("ab" * tokens)
    traces = [drawn.trace(text, _rows(random, len(text.ids))) for _ in range(sources)]
    shape = (len(text.ids) + int(random.random() < 0.2), sources + int(random.random() < 0.2))
    evidence = weights.Evidence(
        traces=traces,
        allowed=random.random(shape) < 0.7,
        prior=random.random(sources + int(random.random() < 0.2)),
        level="token",
        window=1,
        sharpness=1.0,
        switch=0.05,
        vocabulary_size=99,
    )
    weights.weigh_by_posterior(evidence)


def _scan(made, random: np.random.Generator) -> None:
    rows, vocab = int(random.integers(1, 4)), int(random.integers(1, 200))
    logits = torch.from_numpy(random.normal(size=(rows, vocab)).astype(np.float32) * float(random.choice([1, 30, 1e4])))
    if random.random() < 0.3:
        logits[0, int(random.integers(vocab))] = float(random.choice([np.nan, np.inf, -np.inf]))
    other = logits if random.random() < 0.8 else torch.zeros(rows, vocab + 64)
    found = scan.survey_logits(other)
    scan.find_above(logits, found.maxima, torch.from_numpy(random.normal(size=rows).astype(np.float32)))
    gold = torch.from_numpy(_hurt(random.integers(0, vocab, rows), random))
    scan.draw_entries(logits, found, gold, random.random(rows), int(random.integers(1, 30)))


def _strings(made, random: np.random.Generator) -> None:
    def words(count: int) -> list[str]:
        return ["".join(random.choice(list("abé漢\x00"), int(random.integers(0, 70)))) for _ in range(count)]

    nearest.find_nearest_tokens(words(3), [*words(5), None])
    nearest.find_tied_tokens(words(2), words(4))
    mined.pair_positions(words(int(random.integers(4))), words(3), most_steps=int(random.integers(1, 9)))


def _spelling(made, random: np.random.Generator) -> None:
    merges = [tuple(map(int, pair)) for pair in random.integers(0, 12, (int(random.integers(0, 7)), 2))]
    one = drawn.byte_pairs(merges, dummy_prefix=[None, False, True][int(random.integers(3))])
    spelling.spell_vocabulary(one, made[0][1])


KERNELS = [_span, _span, _span, _rounding, _pooling, _batches, _weights, _scan, _strings, _spelling]
