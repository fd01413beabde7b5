"""Measure merging beside mergekit: seconds and memory of the same merges, each in a process of its own.

    python benchmarks/merging.py [MODEL] [--json]

MODEL (by default the demo's Qwen2.5-Coder-0.5B) is copied three times with other noise on its weights, in bfloat16.
Memory is the most that a process holds above what it held before the merge, pages of files included. Tools take turns.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from fuselm.models.locating import locate_model
from fuselm.models.merging import tensor_files
from fuselm.models.merging.tensor_files import TensorFolder
from fuselm.training.companions import copy_companions

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/qwen2.5-coder-0.5b-instruct.gguf"
METHODS = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "ties": {"weight": 0.5, "density": 0.5},
    "sce": {"select_topk": 0.5},
}
TURNS = 2


def copy_with_noise(folder: TensorFolder, out: Path, seed: int) -> Path:
    """Write a model whose weights have noise of a hundredth of their size."""
    tensors = {name: (info.shape, "bfloat16") for name, info in folder.tensors.items()}
    shards, _ = tensor_files.plan_shards(tensors, limit=1 << 60)

    def read() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for name, (shape, _) in tensors.items():
            rows = folder.read(name).reshape(shape or (1,))
            yield rows + 0.01 * rows.std() * torch.randn(rows.shape, generator=generator)

    out.mkdir()
    tensor_files.write_shard(out / "model.safetensors", shards[0], read())
    copy_companions(folder.model.folder, out)
    (out / "config.json").write_text(json.dumps(folder.config))
    return out


def write_recipe(method: str, models: list[str], folder: Path) -> Path:
    """Write a file that both tools read."""
    parameters = METHODS[method]
    count = 1 if method == "slerp" else 3
    own = {name: parameters[name] for name in ("weight", "density") if name in parameters}
    recipe = {
        "merge_method": method,
        "models": [{"model": model, "parameters": own} for model in models[1 : count + 1]],
        "parameters": {name: value for name, value in parameters.items() if name not in own},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        recipe["base_model"] = models[0]
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def resident() -> int:
    """Return the bytes of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def merge(tool: str, recipe: Path, out: Path, queue: multiprocessing.Queue) -> None:
    """Merge once, and put seconds and bytes into the queue."""
    if tool == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        configuration = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))

        def work() -> None:
            run_merge(configuration, str(out), options=MergeOptions(copy_tokenizer=True, lazy_unpickle=True))
    else:
        from fuselm.runs.merging.merge import merge_models, plan_merge
        from fuselm.runs.merging.recipe import load_recipe
        from fuselm.system.progress import Progress

        def work() -> None:
            plan = plan_merge(load_recipe(recipe)[0])
            merge_models(plan, out, Progress(Console(quiet=True), "merge"))

    before, most, is_done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_done.wait(0.02):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    is_done.set()
    watcher.join()
    queue.put((seconds, most - before))


def measure(model: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return the fewest seconds and the most bytes of each tool, by method."""
    spawn = multiprocessing.get_context("spawn")
    result: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original = TensorFolder(locate_model(model))
        models = [str(copy_with_noise(original, folder / f"model-{seed}", seed)) for seed in range(4)]
        for method in METHODS:
            recipe = write_recipe(method, models, folder)
            for turn in range(TURNS):
                for tool in ("fuselm", "mergekit"):
                    queue = spawn.Queue()
                    out = folder / f"{method}-{tool}-{turn}"
                    process = spawn.Process(target=merge, args=(tool, recipe, out, queue))
                    process.start()
                    seconds, size = queue.get()
                    process.join()
                    found = result.setdefault(method, {}).setdefault(tool, {"seconds": seconds, "bytes": size})
                    found["seconds"] = min(found["seconds"], seconds)
                    found["bytes"] = max(found["bytes"], size)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.model)
    if arguments.json:
        json.dump(found, sys.stdout)
        return
    table = Table("method", "fuselm, s", "mergekit, s", "ratio", "fuselm, GiB", "mergekit, GiB")
    for method, tools in found.items():
        ours, theirs = tools["fuselm"], tools["mergekit"]
        table.add_row(
            method,
            f"{ours['seconds']:.1f}",
            f"{theirs['seconds']:.1f}",
            f"{ours['seconds'] / theirs['seconds']:.2f}",
            f"{ours['bytes'] / (1 << 30):.2f}",
            f"{theirs['bytes'] / (1 << 30):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
