"""Read run files with other values, keys and types, and files that are not YAML."""

from pathlib import Path

import numpy as np
import yaml
from fuzz.targets.importers import _change

from fuselm.runs import config

WHOLE = {
    "output": "out",
    "seed": 0,
    "target": "models/a",
    "sources": {"b": "models/b", "c": {"model": "models/c", "dtype": "float32"}, "d": {"model": "m", "store": "s"}},
    "corpus": {"files": ["a.jsonl"], "dev": 0.1, "heldout": 0.2, "max_bytes": 1000},
    "capture": {"policy": "threshold", "top_k": 13, "batch_tokens": 131},
    "align": {"method": "span", "top_k": 64},
    "fuse": {"function": "avg_ce", "level": "window", "weights": {"b": 0.5, "c": {"x": 1.0}}},
    "train": {"learning_rate": [1e-4, 1e-3], "passes": 2, "batch_documents": 2},
    "evaluate": {"batch_tokens": 512},
}


def prepare(folder: Path):
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    config.load(path, [])
    return WHOLE


def case(made, random: np.random.Generator, folder: Path) -> None:
    chosen = yaml.safe_load(yaml.safe_dump(made))
    for _ in range(int(random.integers(0, 3))):
        _change(chosen, random)
    data = bytearray(yaml.safe_dump(chosen).encode())
    if random.random() < 0.4 and data:
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(len(data)))] = int(random.integers(256))
    path = folder / "run.yaml"
    path.write_bytes(data)
    overrides = ["train.passes=3", "x", "=", "a.b.c=1", "train={", "seed=&a [*a]", "sources.b=null"]
    config.load(path, [str(random.choice(overrides))] if random.random() < 0.3 else [])
