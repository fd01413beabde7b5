"""Measure what fusion costs: `python benchmarks/fusion.py [RUN_FILE [NAME=VALUE ...]] [--json]`.

Times are microseconds a token on one core. The aligned stores are those of the run file, by default the demo's, and are
made if they are not there. Every function and number of sources is timed in turn, in several rounds, and the least time
of each counts. Reading the stores and writing the fused one are timed apart.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import fuselm
from fuselm.fusion.choices import FUNCTIONS
from fuselm.fusion.fuse import fuse
from fuselm.stores.store import write_parts

ROOT = Path(__file__).parents[1]
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="examples/quickstart.yaml", help="a run file")
    parser.add_argument("overrides", nargs="*", help="options that replace those of the file, as name=value")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    options = parser.parse_args()
    os.chdir(ROOT)
    stores = list(fuselm.load_run(options.run, options.overrides, quiet=options.json).align().values())
    result = measure(stores, stores[0].manifest["counts"]["vocabulary_size"])
    print(json.dumps(result, indent=None if options.json else 1))


def measure(stores: list[fuselm.Store], vocabulary_size: int) -> dict:
    """Return microseconds a token for each number of sources and function, for reading and for writing."""
    documents = [d for d in stores[0].documents if all(d in store for store in stores)]
    traces = [store.read_many(documents) for store in stores]
    tokens = sum(len(trace.tokens) for trace in traces[0])
    tasks: dict[str, Callable[[], object]] = {"read, a source": lambda: list(stores[0])}
    for count in range(2, len(stores) + 1):
        rows = list(zip(*traces[:count], strict=True))
        for function in FUNCTIONS:
            tasks[f"fuse {count} sources by {function}"] = lambda rows=rows, function=function: [
                fuse(of_document, vocabulary_size=vocabulary_size, function=function) for of_document in rows
            ]
    fused = [fuse(of_document, vocabulary_size=vocabulary_size) for of_document in zip(*traces, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**6))

        def write() -> None:
            out = Path(folder, str(next(numbers)))
            out.mkdir()
            write_parts(out, iter(fused))

        tasks["write"] = write
        least = dict.fromkeys(tasks, float("inf"))
        for _ in range(ROUNDS):
            for name, task in tasks.items():
                began = time.thread_time()
                task()
                least[name] = min(least[name], time.thread_time() - began)
    return {"tokens": tokens, "us_per_token": {name: seconds / tokens * 1e6 for name, seconds in least.items()}}


if __name__ == "__main__":
    main()
