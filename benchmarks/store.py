"""Measure the store's size, fidelity and speed in one run: `python benchmarks/store.py [--json]`.

On the demo's models (`make models` fetches them) and the training documents of its corpus. What is slow to make is kept
under `runs/benchmarks` and found again; times are medians of five, on one core.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from fuselm.documents import corpus
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores import store
from fuselm.stores.policies import POLICIES
from fuselm.stores.rows import Trace, read_traces
from fuselm.stores.store import Store
from fuselm.system import manifest

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "benchmarks"
MODELS = {"gemma": "models/gemma-3-270m.gguf", "qwen": "models/qwen2.5-coder-0.5b-instruct.gguf"}
DEFAULT = {"policy": "sampled"} | POLICIES["sampled"]
WIDE = {"policy": "top_k", "top_k": 128}  # what narrower policies are taken of, for their bytes
RUNS = 5
BATCH_TOKENS = 1024
MANY = 1_000_000
COPIES = 64
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--parts", default="bytes,gradient,capture,reading,checking,many", help="which to measure")
    parser.add_argument("--models", default=",".join(MODELS), help="on which models")
    parser.add_argument("--documents", type=int, default=8, help="of the gradients, and of a timed capture")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options.models, options.documents)))
        return
    models = options.models.split(",")
    parts = {
        "bytes": lambda: {name: sizes(name) for name in models},
        "gradient": lambda: {name: gradient(name, options.documents) for name in models},
        "capture": lambda: {name: throughput(name, options.documents) for name in models},
        "reading": reading,
        "checking": checking,
        "many": many,
    }
    if unknown := set(options.parts.split(",")) - set(parts):
        parser.error(f"--parts: no part '{min(unknown)}'; there are {', '.join(parts)}")
    result = {name: parts[name]() for name in options.parts.split(",")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def median(run: Callable[[], object]) -> float:
    """Return the median of seconds, after one run to warm up."""
    run()
    return statistics.median(seconds(run) for _ in range(RUNS))


# ---- size


def sizes(name: str) -> dict:
    """Return bytes per token, in total, by column and under other policies."""
    from store_gradient import POLICIES, label

    folder = captured(name, DEFAULT)
    result = {"default": folder_size(folder) | {"columns": columns(folder)}, "policies": {}}
    for options in POLICIES:
        made = captured(name, options) if options["policy"] == "sampled" else reduced(name, options)
        result["policies"][label(options)] = folder_size(made)
    return result


def folder_size(folder: Path) -> dict:
    counts = manifest.read(folder)["counts"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "bytes_per_token": size / counts["tokens"],
        "entries_per_token": counts["entries"] / counts["tokens"],
        "tokens": counts["tokens"],
    }


def columns(folder: Path) -> dict[str, float]:
    """Return compressed bytes per token by column."""
    sums: dict[str, int] = {}
    for path in folder.glob("part-*.parquet"):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for n in range(metadata.num_columns):
                column = metadata.row_group(group).column(n)
                name = column.path_in_schema.split(".")[0]
                sums[name] = sums.get(name, 0) + column.total_compressed_size
    return {name: size / manifest.read(folder)["counts"]["tokens"] for name, size in sums.items()}


def reduced(name: str, options: dict) -> Path:
    """Write a store of what a policy keeps of the wide store's rows."""
    from fuselm.stores.retention import Policy, narrow_rows

    wide, policy = Store(captured(name, WIDE)), Policy(**options)

    def build(out: Path) -> dict:
        return store.write_parts(out, (replace(t, distributions=narrow_rows(policy, t.distributions)) for t in wide))

    return kept(f"reduced-{name}", options, build)


# ---- fidelity


def gradient(name: str, per_run: int) -> dict:
    from store_gradient import measure

    model, vocabulary = model_of(name)
    long = [d for d in documents() if len(vocabulary.segment(d.text).ids) >= 128]
    return measure(model, vocabulary, long[:: max(len(long) // per_run, 1)][:per_run])


# ---- capture


def throughput(name: str, count: int) -> dict:
    """Time a capture beside the bare forward pass with the same batches, each in a process of its own."""
    found = {}
    for worker in ("bare", "capture"):
        arguments = ["--worker", worker, "--models", name, "--documents", str(count)]
        ended = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        found[worker] = json.loads(ended.stdout)
    return found | {
        "speed": found["capture"]["tokens_per_second"] / found["bare"]["tokens_per_second"],
        "memory": found["capture"]["peak_bytes"] / found["bare"]["peak_bytes"],
        "padding": padding(name),
    }


def padding(name: str) -> float:
    """Return the share of padding in all that is read of the whole corpus."""
    from fuselm.models import forward

    _, vocabulary = model_of(name)
    lengths = vocabulary.count_tokens([d.text for d in documents()])
    read = sum(
        len(batch) * max(lengths[i] for i in batch) for batch in forward.group_into_batches(lengths, BATCH_TOKENS)
    )
    return 1 - sum(lengths) / read


def worker(task: str) -> Callable[[str, int], dict]:
    def run(name: str, count: int) -> dict:
        import torch

        from fuselm.models import forward
        from fuselm.sources import capture
        from fuselm.stores.retention import Policy

        source, chosen = source_of(name), documents()[:: max(len(documents()) // count, 1)]
        segmentations = [source.vocabulary.segment(d.text) for d in chosen]
        lengths = [len(s.ids) for s in segmentations]

        def bare() -> None:
            with torch.inference_mode():
                for batch in forward.group_into_batches(lengths, BATCH_TOKENS):
                    inputs, mask = forward.pad_inputs([segmentations[i].ids for i in batch], source.context_token)
                    hidden = forward.compute_hidden_states(source.model, source.layer, inputs, mask)[mask.bool()]
                    for _ in source.layer.compute_logits_by_chunk(hidden):
                        pass

        def all_of_it() -> None:
            out = WORK / "timed"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            policy = Policy(**DEFAULT)
            capture.capture_from_model(source, chosen, out, policy=policy, batch_tokens=BATCH_TOKENS, progress=quiet())

        took = median(bare if task == "bare" else all_of_it)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"tokens_per_second": sum(lengths) / took, "peak_bytes": peak}

    return run


# ---- reading


def reading() -> dict:
    """Measure reading of a store of about a million tokens.

    Return tokens a second for its traces from beginning to end and for training batches, in that order and in the
    order of training; and milliseconds for one document at random, for any use and for training.
    """
    from fuselm.training.batches import KEPT_TOKENS, Batches, Collator

    folder, (model, vocabulary) = copied(), model_of("gemma")
    chosen = [replace(d, id=f"{n:02d} {d.id}") for n in range(COPIES) for d in documents()]
    tokens, collate = manifest.read(folder)["counts"]["tokens"], Collator(model.context_token, packed=False)
    options = {"passes": 1, "batch_documents": 4, "pack_tokens": None, "seed": 0, "processes": 1}

    def one_pass() -> None:
        dataset = Batches(chosen, vocabulary, Store(folder, keep_tokens=KEPT_TOKENS), **options)
        for n in range(len(dataset)):
            collate([dataset[n]])

    def in_order() -> None:
        found = Store(folder)
        names = found.documents
        for begin in range(0, len(names), 4):
            rows = [found.read_for_training(name) for name in names[begin : begin + 4]]
            collate([[{"tokens": r.tokens, "fused": r} for r in rows]])

    names = [d.id for d in random.Random(0).choices(chosen, k=101)]

    def one(read: Callable[[str], object]) -> dict:
        read(chosen[0].id)
        took = [seconds(lambda name=name: read(name)) * 1e3 for name in names]
        return {"median": statistics.median(took), "worst": max(took)}

    return {
        "tokens": tokens,
        "tokens_per_second": tokens / median(lambda: deque(Store(folder), maxlen=0)),
        "tokens_per_second_into_batches": tokens / median(in_order),
        "tokens_per_second_into_shuffled_batches": tokens / median(one_pass),
        "random_document_milliseconds": one(Store(folder).read),
        "random_document_for_training_milliseconds": one(Store(folder).read_for_training),
    }


def checking() -> dict:
    """Measure what it costs to check a store that is not known to be sound.

    Return seconds of CPU of its first and second reading, and what `verify` takes: medians of runs by turns, because
    the machine may be busy.
    """
    from fuselm.stores.verification import verify_store
    from fuselm.system import fingerprints

    folder, known = copied(), fingerprints.find_cache_folder() / "fingerprints.json"
    took: dict[str, list[float]] = {"first": [], "second": [], "verify": []}
    steps = {"first": lambda: deque(Store(folder), maxlen=0), "second": lambda: deque(Store(folder), maxlen=0)}
    steps["verify"] = lambda: verify_store(folder, progress=quiet())
    for _ in range(RUNS + 1):
        known.unlink(missing_ok=True)
        for name, step in steps.items():
            began = time.process_time()
            step()
            took[name].append(time.process_time() - began)
    seconds_of = {name: statistics.median(values[1:]) for name, values in took.items()}  # the first one compiles
    return {"tokens": manifest.read(folder)["counts"]["tokens"], "seconds": seconds_of} | {
        "ratio": seconds_of["first"] / seconds_of["second"]
    }


def copied() -> Path:
    """Copy the captured documents many times, each time under other names."""

    def tables() -> Iterator[pa.Table]:
        for n in range(COPIES):
            for table in Store(captured("gemma", DEFAULT)).read_tables():
                names = pa.array([f"{n:02d} {name}" for name in table["document"].to_pylist()])
                yield table.set_column(0, table.schema.field(0), names)

    def build(out: Path) -> dict:
        store.write_tables(store.part_path(out, 0), tables())
        return store.write_index(out)

    return kept("copied", {"copies": COPIES}, build)


def many() -> dict:
    """Open a store of a million documents, in a process of its own."""
    many_documents()
    found = subprocess.run(
        [sys.executable, __file__, "--worker", "open"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(found.stdout)


def many_documents() -> Path:
    def tables() -> Iterator[pa.Table]:
        first = next(Store(captured("gemma", DEFAULT)).read_tables()).slice(0, 8)
        few = [trim(trace) for trace in read_traces(first)]
        table = store.build_table(few * 128)
        for begin in range(0, MANY, len(table)):
            table = table.slice(0, min(len(table), MANY - begin))
            names = pa.array([f"{n:07d}" for n in range(begin, begin + len(table))])
            yield table.set_column(0, table.schema.field(0), names)

    def build(out: Path) -> dict:
        store.write_tables(store.part_path(out, 0), tables())
        return store.write_index(out)

    return kept("many", {"documents": MANY}, build)


def trim(trace: Trace) -> Trace:
    """Return its first three tokens."""
    d = trace.distributions
    end = int(d.offsets[3])
    first = replace(
        d, offsets=d.offsets[:4], ids=d.ids[:end], logprobs=d.logprobs[:end], gold=d.gold[:3], tail=d.tail[:3]
    )
    return replace(
        trace, tokens=trace.tokens[:3], starts=trace.starts[:3], distributions=first, weights=trace.weights[:3]
    )


def open_many(_name: str, _count: int) -> dict:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    folder, before, began = many_documents(), resident(), time.perf_counter()
    found = Store(folder)
    opened, held = time.perf_counter() - began, resident() - before
    names = [f"{n:07d}" for n in np.random.default_rng(0).choice(MANY, 101)]
    found.read(names[0])
    return {
        "documents": len(found),
        "seconds_to_open": opened,
        "bytes_to_open": held,
        "random_document_milliseconds": statistics.median(seconds(lambda n=n: found.read(n)) for n in names) * 1e3,
    }


WORKERS: dict[str, Callable[[str, int], dict]] = {
    "bare": worker("bare"),
    "capture": worker("capture"),
    "open": open_many,
}


# ---- models, documents, stores


def model_of(name: str) -> tuple[Model, Vocabulary]:
    model = locate_model(MODELS[name])
    return model, load_vocabulary(model)


def documents() -> list[corpus.Document]:
    """Return the quickstart's training documents."""
    texts = list(corpus.read_texts(ROOT / "examples/corpus/quickstart.jsonl"))
    return [d for d in corpus.draw_splits(texts, dev=0.1, heldout=0.65, seed=0) if d.split == "train"]


def source_of(name: str):
    from fuselm.models import forward
    from fuselm.models.loading import load_model
    from fuselm.sources import capture

    model, vocabulary = model_of(name)
    loaded = load_model(model, dtype="bfloat16")
    layer = forward.find_output_layer(loaded)
    reads = {"context_token": model.context_token, "context_length": model.context_length}
    return capture.LoadedSource(model=loaded, layer=layer, vocabulary=vocabulary, **reads)


def captured(name: str, options: dict) -> Path:
    """Return a capture of the training documents, made once."""

    def build(out: Path) -> dict:
        from fuselm.sources import capture
        from fuselm.stores.retention import Policy
        from fuselm.system.progress import show_progress

        with show_progress(console, f"capture {name} {options}") as shown:
            return capture.capture_from_model(
                source_of(name), documents(), out, policy=Policy(**options), batch_tokens=BATCH_TOKENS, progress=shown
            )

    return kept(f"captured-{name}", options, build)


def kept(name: str, options: dict, build: Callable[[Path], dict]) -> Path:
    recipe = manifest.Recipe(stage="capture", parameters={"name": name, **options})
    folder = WORK / f"{name}-{recipe.key}"
    manifest.build_once(folder, recipe, build)
    return folder


def quiet():
    from fuselm.system.progress import Progress

    return Progress(Console(file=open(os.devnull, "w"), force_terminal=False), "")


if __name__ == "__main__":
    main()
