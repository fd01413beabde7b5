"""Import records of all layouts with other values, keys and types; what is imported must be a whole store."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import drawn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.targets.index_manifest import VALUES
from rich.console import Console

from fuselm.sources.interchange import distillkit, foreign, importing
from fuselm.stores import store, verification
from fuselm.system import manifest
from fuselm.system.progress import Progress

TEXTS = ["ab é ba", "b a", "éé aab"]
QUIET = Progress(Console(quiet=True), "")


def prepare(folder: Path):
    random, vocabulary = np.random.default_rng(0), drawn.byte_pairs([(0, 1), (2, 0)])
    tokens = foreign.LayoutTokenizer(vocabulary=vocabulary, context=0)
    records = {}
    for name, layout in foreign.LAYOUTS.items():
        traces = [drawn.trace_of(vocabulary, t, random, top_k=3, document=f"d{n}") for n, t in enumerate(TEXTS)]
        records[name] = [layout.write(t, x, tokens, layout.is_ahead) for t, x in zip(traces, TEXTS, strict=True)]
    folder.mkdir()
    for name, whole in records.items():
        _read(_write(folder / f"{name}.jsonl", whole), name, tokens, folder / f"{name}-store")
    return records, tokens


def case(made, random: np.random.Generator, folder: Path) -> None:
    records, tokens = made
    if random.random() < 0.15:
        _compressed(random)
        return
    name = str(random.choice(list(records)))
    chosen = json.loads(json.dumps(records[name]))
    for _ in range(int(random.integers(1, 3))):
        _change(chosen, random)
    path = folder / ("r.jsonl" if random.random() < 0.8 else "r.parquet")
    if path.suffix == ".jsonl":
        _write(path, chosen)
        if random.random() < 0.2:
            data = bytearray(path.read_bytes())
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
    else:
        try:
            pq.write_table(pa.Table.from_pylist([r for r in chosen if isinstance(r, dict)]), path)
        except (pa.ArrowException, TypeError, AttributeError, OverflowError):
            return  # nobody can write it
    _read(path, name, tokens, folder / "store")


def _write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _read(path: Path, layout: str, tokens: foreign.LayoutTokenizer, out: Path) -> None:
    counted: Counter[str] = Counter()
    reading = importing.ImportOptions(layout=layout)
    recipe = manifest.Recipe(stage="capture", parameters={"layout": layout}, inputs={"tokenizer": "x"})

    def build(partial: Path) -> dict:
        traces = importing.read_traces([path], reading, tokens, counted=counted)
        return store.write_parts(partial, traces) | {"vocabulary_size": tokens.vocabulary.size}

    manifest.build_once(out, recipe, build)
    problems = verification.verify_store(out, progress=QUIET).problems
    assert not problems, f"imported, but {problems[0]}"


def _change(made: Any, random: np.random.Generator) -> None:
    """Replace a value somewhere in a record, or delete it."""
    keys = list(made) if isinstance(made, dict) else list(range(len(made)))
    if not keys:
        return
    key = keys[int(random.integers(len(keys)))]
    if isinstance(made[key], dict | list) and made[key] and random.random() < 0.85:
        _change(made[key], random)
    elif random.random() < 0.2:
        del made[key]
    elif isinstance(made[key], float) and random.random() < 0.6:
        made[key] = float(random.choice([0.0, 0.5, 50.0, -1e9, -9999, -1e300, 1e300, np.inf, -np.inf, np.nan]))
    else:
        made[key] = VALUES[int(random.integers(len(VALUES)))]


def _compressed(random: np.random.Generator) -> None:
    """Decompress random bytes by a random configuration."""
    configuration = {
        "d": int(random.choice([1, 2, 99, 2**17, 2**40, 0, -1])),
        "k": int(random.choice([0, 1, 4, 50, -1])),
    }
    configuration |= {"exact_k": int(random.choice([0, 2, 4, 60, -3])), "delta_encoding": bool(random.random() < 0.5)}
    configuration |= {"polynomial_terms": [None, [0, 1, "sqrt"], ["x"], [2, "exp"]][int(random.integers(4))]}
    if random.random() < 0.5:
        bin_ = {"scale_dtype": "float16", "element_bits": int(random.choice([1, 4, 0, 99])), "num_elements": 2}
        configuration["residual_bins"] = [bin_]
    if random.random() < 0.3:
        _change(configuration, random)
    packed, ids = (
        random.integers(0, 256, (3, int(random.choice([0, 1, 8, 16, 48, 99])))).astype(np.uint8) for _ in "ab"
    )
    with np.errstate(all="ignore"):
        found, logprobs = distillkit.decompress(packed, ids, configuration)
    assert found.shape == logprobs.shape
