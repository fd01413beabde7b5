"""Read indexes and manifests with other values, of right and of wrong types, whose checksums fit."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.targets import store_values
from tampered import put_together

from fuselm.stores import contents as told
from fuselm.stores import store

VALUES: list[Any] = [None, True, -1, 0, 1, 3, 99, 2**31, 10**30, 0.5, float("nan")]
VALUES += ["", "x", "../x", [], [1], {}, {"a": 1}]


def prepare(folder: Path):
    contents, source, target = store_values.prepare(folder)
    return contents, source, target, [trace.document for trace in store.Store(folder)]


def case(made, random: np.random.Generator, folder: Path) -> None:
    whole, source, target, documents = made
    contents = copy.deepcopy(whole)
    contents.index_rows()
    if random.random() < 0.5:
        _change_index(contents.index, random)
        path = put_together(contents, folder / "store")
    else:
        path = put_together(contents, folder / "store")
        made_by = json.loads((path / "manifest.json").read_text())
        _change_json(made_by, random)
        (path / "manifest.json").write_text(json.dumps(made_by))
    told.make_facts_table(told.read_facts(path))
    store_values.used(path, source, target)
    assert [trace.document for trace in store.Store(path)] == documents, "other documents"


def _change_index(index: list[dict[str, Any]], random: np.random.Generator) -> None:
    way, row = random.integers(5), index[int(random.integers(len(index)))]
    if way == 0:
        index.remove(row)
    elif way == 1:
        index.insert(int(random.integers(len(index))), dict(row))
    elif way == 2:
        random.shuffle(index)
    else:
        name = str(random.choice(list(row)))
        row[name] = "d9" if isinstance(row[name], str) else int(random.choice([-1, 0, 1, 2, 99, 2**31 - 1, -(2**31)]))


def _change_json(made: Any, random: np.random.Generator) -> None:
    """Replace a value somewhere in it, or delete it."""
    keys = list(made)
    key = keys[int(random.integers(len(keys)))]
    if isinstance(made[key], dict) and made[key] and random.random() < 0.7:
        _change_json(made[key], random)
    elif random.random() < 0.2:
        del made[key]
    else:
        made[key] = VALUES[int(random.integers(len(VALUES)))]
