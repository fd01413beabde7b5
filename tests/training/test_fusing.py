"""Test fusing.py: rows that are aligned and fused when they are read are those of the stores, bit for bit."""

import io
from dataclasses import fields

import drawn
import numpy as np
import pytest
from rich.console import Console
from torch.utils.data import DataLoader

from fuselm.alignment.aligner import Aligner, align_store
from fuselm.documents.corpus import Document
from fuselm.fusion.fuse import fuse_stores
from fuselm.runs.options.fusion import FuseOptions
from fuselm.stores.rows import TrainingRows
from fuselm.stores.store import Store, write_parts
from fuselm.system import manifest
from fuselm.system.manifest import Recipe, build_once
from fuselm.system.progress import Progress
from fuselm.training.batches import Batches, Collator
from fuselm.training.fusing import FUSE_OPTIONS, RowFusion

TARGET = drawn.byte_pairs([(0, 1), (2, 0)])
SOURCES = {
    "pieces": drawn.byte_pairs([(1, 0), (3, 1), (0, 0)], dummy_prefix=True),
    "same": TARGET,
    "words": drawn.byte_pairs([(1, 1)]),
}
TEXTS = ["abba", "a bé b", " ", "ba" * 7, "é", "bb a", "", "aab éb"]
DOCUMENTS = [
    Document(id=f"d{n}", origin=f"d{n}", domain="xy"[n % 2], text=text, split="train") for n, text in enumerate(TEXTS)
]
OPTIONS = [
    {},
    {"function": "min_ce", "level": "document"},
    {"function": "log_linear", "temperatures": {"same": 1.3}},
    {"function": "bayes", "weights": {"words": {"x": 3.0}}},
]


def silent() -> Progress:
    return Progress(Console(file=io.StringIO()), "test")


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> dict[str, Store]:
    """Write random captures; one of them lacks a document."""
    folder, random = tmp_path_factory.mktemp("captured"), np.random.default_rng(0)
    for n, (name, vocabulary) in enumerate(SOURCES.items()):
        chosen = [d for d in DOCUMENTS if (name, d.id) != ("words", "d5")]
        traces = [drawn.trace_of(vocabulary, d.text, random, top_k=(3, None, 5)[n], document=d.id) for d in chosen]
        build_once(folder / name, Recipe(stage="capture"), lambda out, traces=traces: write_parts(out, traces))
    return {name: Store(folder / name) for name in SOURCES}


@pytest.fixture(scope="module")
def aligners() -> dict[str, Aligner]:
    return {name: Aligner(vocabulary, TARGET, top_k=6) for name, vocabulary in SOURCES.items()}


@pytest.fixture(scope="module")
def aligned(captured, aligners, tmp_path_factory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("aligned")
    for name, aligner in aligners.items():
        build_once(
            folder / name,
            Recipe(stage="align"),
            lambda out, name=name, aligner=aligner: align_store(
                aligner, captured[name], DOCUMENTS, out, progress=silent()
            ),
        )
    return {name: Store(folder / name) for name in SOURCES}


def make_both(captured, aligners, aligned, out, options) -> tuple[Store, RowFusion]:
    """Return a fused store, and the way to make its rows from the captures."""
    recipe = FuseOptions(**options).recipe | {"vocabulary_size": TARGET.size}
    build_once(out, Recipe(stage="fuse"), lambda out: fuse_stores(aligned, DOCUMENTS, out, **recipe, progress=silent()))
    fusion = RowFusion(
        captured=captured,
        aligners=aligners,
        weights=manifest.read(out)["counts"]["weights"],
        temperatures=[recipe["temperatures"].get(name, 1.0) for name in captured],
        options={name: recipe[name] for name in FUSE_OPTIONS},
    )
    return Store(out), fusion


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.get("function", "fixed"))
def test_rows_made_when_they_are_read_are_those_of_the_store(captured, aligners, aligned, tmp_path, options):
    stored, fusion = make_both(captured, aligners, aligned, tmp_path / "fused", options)
    documents = fusion.choose_documents(DOCUMENTS)
    assert [d.id for d in documents] == [d.id for d in DOCUMENTS if d.id in stored] != [d.id for d in DOCUMENTS]
    how = {"passes": 2, "batch_documents": 3, "pack_tokens": None, "seed": 0, "processes": 1}
    from_store, made = (Batches(documents, TARGET, fused, **how) for fused in (stored, fusion))
    assert len(from_store) == len(made) > 4
    for n in range(len(made)):
        for expected, item in zip(from_store[n], made[n], strict=True):
            assert np.array_equal(expected["tokens"], item["tokens"])
            for field in fields(TrainingRows):
                one, other = (getattr(of["fused"], field.name) for of in (expected, item))
                assert np.array_equal(one, other) and one.dtype == other.dtype, field.name


def test_processes_that_read_ahead_make_the_same_batches(captured, aligners, aligned, tmp_path):
    stored, fusion = make_both(captured, aligners, aligned, tmp_path / "fused", {})
    documents = fusion.choose_documents(DOCUMENTS)
    how = {"passes": 2, "batch_documents": 3, "pack_tokens": None, "seed": 0, "processes": 1}
    collate, dataset = Collator(3, packed=False), Batches(documents, TARGET, fusion, **how)
    loader = DataLoader(dataset, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    expected = Batches(documents, TARGET, stored, **how)
    for n, batch in enumerate(loader):
        alone = collate([expected[n]])
        assert batch.keys() == alone.keys() and all(batch[name].equal(alone[name]) for name in batch)
    assert n + 1 == len(expected)
