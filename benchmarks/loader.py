"""Measure how training reads its batches, in one run: `python benchmarks/loader.py [--json]`.

`waiting`: the share of a step that waits for data where training takes 10,000 tokens a second (a sleep stands for the
model), with rows from a fused store and with rows that are aligned and fused as they are read, by each of `--methods`;
and the microseconds of a core that reading takes, when texts are new to the process and when it has read them before.
On captures of two of the demo's models (`make models` fetches them) over the training documents of its corpus, which
are made once and kept under `runs/benchmarks`.
`start`: seconds until the first batch, and memory, with a synthetic store of many documents; bytes a document are those
that it takes more than a store of a tenth of them.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
from store import DEFAULT, captured, documents, model_of, quiet
from torch.utils.data import DataLoader

from fuselm.alignment.aligner import Aligner, align_store
from fuselm.documents.document import Document
from fuselm.documents.document_list import read_documents
from fuselm.documents.document_writing import DocumentWriter
from fuselm.fusion.fuse import fuse_stores
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.runs.options.fusion import FuseOptions
from fuselm.stores import store, trust
from fuselm.stores.store import Store
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.training.batches import KEPT_TOKENS, Batches, Collator
from fuselm.training.fusing import FUSE_OPTIONS, RowFusion
from fuselm.training.loader_processes import BatchesAhead
from fuselm.training.speed import measure_memory
from fuselm.training.target_training import FUSING_WORKERS, PREFETCHED

ROOT = Path(__file__).parents[1]
TARGET = "models/smollm2-135m-instruct.gguf"
SOURCES = ("gemma", "qwen")
STEPS = 150
WARM_UP = 10  # steps that are not counted: kernels are read, and maps made
PASSES = 99  # more than the steps take
MANY = 1_000_000
SYNTHETIC_TOKENS = 16  # of a document of the synthetic store
ORDER = {"passes": 4, "batch_documents": 4, "pack_tokens": None, "seed": 0, "processes": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument("--parts", default="waiting,start", help="which to measure")
    parser.add_argument("--methods", default="branches,span", help="of alignment, for `waiting`")
    parser.add_argument("--rate", type=int, default=10_000, help="tokens a second that training takes")
    parser.add_argument("--documents", type=int, default=MANY, help="of the synthetic store")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.worker:
        print(json.dumps(measure_first_batch(Path(options.worker), options.way)))
        return
    parts = {
        "waiting": lambda: measure_waiting(options.methods.split(","), options.rate),
        "start": lambda: measure_start(options.documents),
    }
    result = {name: parts[name]() for name in options.parts.split(",")}
    print(json.dumps(result, indent=None if options.json else 1))


# ---- waiting for data


def measure_waiting(methods: list[str], rate: int) -> dict:
    """Return the share of time that steps wait, by method, way and number of processes that read ahead."""
    target = locate_model(TARGET)
    vocabulary, chosen = load_vocabulary(target), documents()
    vocabularies = {name: load_vocabulary(model_of(name)[0]) for name in SOURCES}
    result: dict[str, dict] = {"tokens_per_second": rate}
    for method in methods:
        with tempfile.TemporaryDirectory() as temporary:
            fused, fusion = make_both(Path(temporary), method, target, vocabulary, vocabularies, chosen)
            ways = {"stored, 0 processes": (fused, 0), "stored, 1 process": (fused, 1)} if method == methods[0] else {}
            ways |= {f"load, {n} process{'es' * (n > 1)}": (fusion, n) for n in (1, FUSING_WORKERS)}
            shares, microseconds = {}, {}
            for name, (rows, workers) in ways.items():
                dataset = Batches(fusion.choose_documents(chosen), vocabulary, rows, **ORDER | {"passes": PASSES})
                shares[name] = time_steps(dataset, target.context_token, workers, rate)
                if (way := name.partition(",")[0]) not in microseconds:
                    microseconds[way] = time_reading(dataset)
        result[method] = {"share_of_time": shares, "microseconds_a_token": microseconds}
    return result


def make_both(folder: Path, method: str, target, vocabulary, vocabularies, chosen) -> tuple[Store, RowFusion]:
    """Return a fused store and the way to make its rows."""
    captures = {name: captured(name, DEFAULT) for name in SOURCES}

    def make_aligner(name: str) -> Aligner:
        return Aligner(vocabularies[name], vocabulary, method=method, traces=Store(captures[name]))

    for name in SOURCES:
        manifest.build_once(
            folder / name,
            Recipe(stage="align"),
            lambda out, name=name: align_store(
                make_aligner(name), Store(captures[name]), chosen, out, progress=quiet()
            ),
        )
    recipe = FuseOptions().recipe | {"vocabulary_size": target.output_size}
    aligned = {name: Store(folder / name) for name in SOURCES}
    manifest.build_once(
        folder / "fused",
        Recipe(stage="fuse"),
        lambda out: fuse_stores(aligned, chosen, out, **recipe, progress=quiet()),
    )
    fusion = RowFusion(
        captured={name: Store(captures[name], keep_tokens=KEPT_TOKENS) for name in SOURCES},
        aligners={name: make_aligner(name) for name in SOURCES},
        weights=manifest.read(folder / "fused")["counts"]["weights"],
        temperatures=[1.0] * len(SOURCES),
        options={name: recipe[name] for name in FUSE_OPTIONS},
    )
    return Store(folder / "fused", keep_tokens=KEPT_TOKENS), fusion


def time_steps(dataset: Batches, context_token: int, workers: int, rate: int) -> float:
    """Return the share of time that `STEPS` steps wait for their batches."""
    ahead = {"prefetch_factor": PREFETCHED, "multiprocessing_context": "fork"} if workers else {}
    collate = Collator(context_token, packed=False)
    batches = iter(DataLoader(dataset, collate_fn=collate, num_workers=workers, **ahead))
    batches = BatchesAhead(batches) if workers else batches
    waited = began = 0.0
    for step in range(STEPS):
        if step == WARM_UP:
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        time.sleep(int(batch["attention_mask"].sum()) / rate)
    took = time.perf_counter() - began
    if workers:
        batches.stop()
    return waited / took


def time_reading(dataset: Batches) -> dict[str, float]:
    """Return the microseconds of one core for each token, when a text is read first, and when all have been."""
    return {"first": time_pass(dataset, 0), "later": time_pass(dataset, 1)}


def time_pass(dataset: Batches, number: int) -> float:
    """Return the microseconds of one core for each token of a pass."""
    began, tokens, steps = time.process_time(), 0, len(dataset) // PASSES
    for step in range(number * steps, (number + 1) * steps):
        tokens += sum(len(item["tokens"]) for item in dataset[step])
    return 1e6 * (time.process_time() - began) / tokens


# ---- start


def measure_start(count: int) -> dict:
    """Return seconds until the first batch and peak memory, in a process that trains on a synthetic store."""
    folder = Path(tempfile.mkdtemp(dir=ROOT / "runs"))
    try:
        found = []
        for number in (count // 10, count):
            (own := folder / str(number)).mkdir()
            write_synthetic(own, number)
            runs = [[sys.executable, __file__, "--worker", str(own), "--way", way] for way in ("fused", "clm")]
            texts = [subprocess.run(run, check=True, capture_output=True, text=True).stdout for run in runs]
            found.append(dict(zip(("fused", "clm"), map(json.loads, texts), strict=True)))
        few, many = found
        for way, of in many.items():
            more = of["documents"] - few[way]["documents"]
            for name in ("held", "peak"):
                of[f"{name}_bytes_a_document"] = (of[f"{name}_bytes"] - few[way][f"{name}_bytes"]) / more
        return many
    finally:
        shutil.rmtree(folder)


def write_synthetic(folder: Path, count: int) -> None:
    """Write documents, and a store of fused rows with one entry for each token."""
    (tokens,) = load_vocabulary(locate_model(TARGET)).tokenize([" word" * SYNTHETIC_TOKENS])
    assert len(tokens) == SYNTHETIC_TOKENS
    (folder / "corpus").mkdir()
    writer = DocumentWriter(folder / "corpus", ["target"])
    for n in range(count):
        document = Document(id=f"{n:07d}", origin="", domain="a", split="train", text=" word" * SYNTHETIC_TOKENS)
        writer.add(document, [SYNTHETIC_TOKENS])
    writer.finish()
    manifest.build_once(folder / "fused", Recipe(stage="fuse"), lambda out: write_store(out, tokens, count))
    trust.remember_output(folder / "fused")  # as the stage does


def write_store(out: Path, tokens: np.ndarray, count: int) -> dict:
    """Write the rows of one document under the names of all, in parts of 2^19 tokens."""
    each = store.PART_TOKENS // SYNTHETIC_TOKENS
    trace = store.Trace(
        document="",
        size=5 * SYNTHETIC_TOKENS,
        nats=1.0,
        tokens=tokens,
        starts=5 * np.arange(SYNTHETIC_TOKENS, dtype=np.int32),
        distributions=store_row(tokens),
        weights=np.ones((SYNTHETIC_TOKENS, 1), np.float32),
    )
    table = store.build_table([trace] * each)

    def name(begin: int) -> Iterator[pa.Table]:
        names = pa.array([f"{n:07d}" for n in range(begin, min(begin + each, count))])
        yield table.slice(0, len(names)).set_column(0, table.schema.field(0), names)

    for number, begin in enumerate(range(0, count, each)):
        store.write_tables(store.part_path(out, number), name(begin))
    return store.write_index(out) | {"vocabulary_size": 1 << 20}


def store_row(tokens: np.ndarray):
    from fuselm.stores.distributions import Distributions

    return Distributions(
        offsets=np.arange(len(tokens) + 1),
        ids=tokens,
        logprobs=np.full(len(tokens), -0.5, np.float32),
        gold=np.full(len(tokens), -0.5, np.float32),
        tail=np.full(len(tokens), 1 - np.exp(-0.5), np.float32),
    )


def measure_first_batch(folder: Path, way: str) -> dict:
    """Open the corpus, and the store if rows are fused; read the first batch, and then some more."""
    located = locate_model(TARGET)
    vocabulary = load_vocabulary(located)
    began = time.perf_counter()
    chosen = read_documents(folder / "corpus", "train")
    rows = Store(folder / "fused", keep_tokens=KEPT_TOKENS) if way == "fused" else None
    dataset = Batches(chosen, vocabulary, rows, **ORDER, reader="target")
    if rows is not None:
        rows.forget_names()
    Collator(located.context_token, packed=False)([dataset[0]])
    seconds = time.perf_counter() - began
    dataset[len(dataset) - 1]  # of the last pass, so that the orders of two passes are there
    return {
        "seconds": seconds,
        "documents": len(chosen),
        "held_bytes": measure_held_memory(),
        "peak_bytes": measure_memory(),
    }


def measure_held_memory() -> int:
    """Return the bytes that this process holds, without mapped files and what its allocators keep for later."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main()
