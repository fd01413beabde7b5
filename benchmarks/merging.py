"""Measure merging beside mergekit: seconds and memory of the same merges, each in a process of its own.

    python benchmarks/merging.py [MODEL] [--methods linear,slerp] [--limit SECONDS] [--json]

MODEL is a model to copy with noise of a hundredth on its weights (by default the demo's SmolLM2), or `1.5b` for
random weights in the shapes of Qwen2.5-1.5B. Each merge has three models in bfloat16, the base among them. Memory
is the most that a process holds above an interpreter with torch, pages of files included; seconds count from there,
too, so a tool's own imports are in both. The tools take turns. A merge that takes longer than the limit is stopped,
and its seconds are at least that: mergekit's `ties` sorts every difference whole.
"""

import argparse
import json
import multiprocessing
import shutil
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
MODEL = ROOT / "models/smollm2-135m-instruct.gguf"
TOKENIZER = ROOT / "models/qwen2.5-coder-0.5b-instruct.gguf"  # of the random model
LARGE = "1.5b"
LARGE_SIZES = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
LARGE_SIZES |= {"num_attention_heads": 12, "num_key_value_heads": 2, "max_window_layers": 28}
COUNT = 3  # models, the base among them
METHODS = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.5},
    "sce": {"select_topk": 1.0},
    "ties": {"weight": 0.5, "density": 0.5},
}
TURNS = 2


def write_copy(folder: TensorFolder, out: Path, seed: int) -> Path:
    """Write a model whose weights have noise of a hundredth of their size."""
    tensors = {name: (info.shape, "bfloat16") for name, info in folder.tensors.items()}

    def read(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
        rows = folder.read(name).reshape(shape or (1,))
        yield rows + 0.01 * rows.std() * torch.randn(rows.shape, generator=generator)

    return write_model(out, tensors, read, seed, folder.config, folder.model.folder)


def write_large(out: Path, seed: int) -> Path:
    """Write a model of random weights in the shapes of Qwen2.5-1.5B: the same for all seeds, and noise of its own.

    A block of numbers is drawn once and used for every tensor, because drawing takes longer than merging.
    """
    small = TensorFolder(locate_model(str(TOKENIZER)))
    config = small.config | LARGE_SIZES | {"tie_word_embeddings": True}
    config["layer_types"] = ["full_attention"] * LARGE_SIZES["num_hidden_layers"]
    tensors = {name: (shape, "bfloat16") for name, shape in list_shapes(config).items()}

    shared, noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(n)) for n in (COUNT, seed))
    drawn = 0.02 * (shared + 0.01 * noise)

    def read(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
        width = torch.Size(shape[1:]).numel()
        rows = max(1, len(drawn) // width)
        for begin in range(0, shape[0], rows):
            count = min(rows, shape[0] - begin)
            yield drawn[: count * width].reshape(count, *shape[1:])

    return write_model(out, tensors, read, seed, config, small.model.folder)


def list_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an architecture's tensors by name; no weights are made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_model(out: Path, tensors: dict, read, seed: int, config: dict, companions: Path) -> Path:
    """Write the tensors that `read` yields in blocks, in shards of a GiB, and what belongs beside them."""
    generator = torch.Generator().manual_seed(seed)
    shards, index = tensor_files.plan_shards(tensors, limit=1 << 30)
    out.mkdir()
    for shard in shards:
        blocks = (rows for name, (shape, _) in shard.tensors.items() for rows in read(name, shape, generator))
        tensor_files.write_shard(out / shard.name, shard, blocks)
    if index is not None:
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    copy_companions(companions, out)
    (out / "config.json").write_text(json.dumps(config))
    return out


def write_recipe(method: str, models: list[str], folder: Path) -> Path:
    """Write a file that both tools read."""
    parameters = METHODS[method]
    has_base = method != "linear"
    merged = models[:COUNT] if not has_base else models[1:2] if method == "slerp" else models[1:COUNT]
    own = {name: parameters[name] for name in ("weight", "density") if name in parameters}
    recipe = {
        "merge_method": method,
        "models": [{"model": model, "parameters": own} for model in merged],
        "parameters": {name: value for name, value in parameters.items() if name not in own},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if has_base:
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
    before, most, is_done = resident(), 0, threading.Event()
    began = time.perf_counter()
    if tool == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        configuration = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))

        def work() -> None:
            run_merge(configuration, str(out), options=MergeOptions(copy_tokenizer=True, lazy_unpickle=True))
    else:
        from fuselm.runs.merging.merge import make_merge, plan_merge
        from fuselm.runs.merging.recipe import load_recipe
        from fuselm.system.progress import Progress

        def work() -> None:
            plan = plan_merge(load_recipe(recipe)[0])
            make_merge(plan, out, Progress(Console(quiet=True), "merge"))

    def watch() -> None:
        nonlocal most
        while not is_done.wait(0.02):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    seconds = time.perf_counter() - began
    is_done.set()
    watcher.join()
    queue.put((seconds, most - before))


def measure(model: str, methods: list[str], turns: int, limit: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return the fewest seconds and the most bytes of each tool, by method; one that was stopped has `stopped`."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=ROOT / "runs" if (ROOT / "runs").is_dir() else None) as temporary:
        folder = Path(temporary)
        if model == LARGE:
            models = [str(write_large(folder / f"model-{seed}", seed)) for seed in range(COUNT)]
        else:
            original = TensorFolder(locate_model(model))
            models = [str(write_copy(original, folder / f"model-{seed}", seed)) for seed in range(COUNT)]
        for method in methods:
            recipe = write_recipe(method, models, folder)
            for _ in range(turns):
                for tool in ("fuselm", "mergekit"):
                    found = result.setdefault(method, {}).setdefault(tool, {"seconds": float("inf"), "bytes": 0})
                    if "stopped" in found:
                        continue
                    took = run_merge(tool, recipe, folder / "merged", limit)
                    if took is None:
                        found |= {"seconds": limit, "stopped": 1}
                        continue
                    found["seconds"], found["bytes"] = min(found["seconds"], took[0]), max(found["bytes"], took[1])
    return result


def run_merge(tool: str, recipe: Path, out: Path, limit: float) -> tuple[float, int] | None:
    """Merge once in a process of its own; return its seconds and bytes, or None if it was stopped at the limit."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=merge, args=(tool, recipe, out, queue))
    process.start()
    ends = time.monotonic() + limit
    while queue.empty() and process.is_alive() and time.monotonic() < ends:
        time.sleep(0.1)
    found = None
    if not queue.empty():
        found = queue.get()
        process.join()
    elif not process.is_alive():
        raise SystemExit(f"{tool} ended with {process.exitcode} at {recipe.stem}")
    process.kill()
    process.join()
    for leftover in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(leftover)
    return found


def format_seconds(found: dict[str, float]) -> str:
    return f"{'> ' if 'stopped' in found else ''}{found['seconds']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--turns", type=int, default=TURNS, help="times that each tool merges; the fastest counts")
    parser.add_argument("--limit", type=float, default=120.0, help="stop a merge after this many seconds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.methods.split(","), arguments.turns, arguments.limit)
    if arguments.json:
        json.dump(found, sys.stdout)
        return
    table = Table("method", "fuselm, s", "mergekit, s", "ratio", "fuselm, GiB", "mergekit, GiB")
    for method, tools in found.items():
        ours, theirs = tools["fuselm"], tools["mergekit"]
        table.add_row(
            method,
            format_seconds(ours),
            format_seconds(theirs),
            f"{'< ' if 'stopped' in theirs else ''}{ours['seconds'] / theirs['seconds']:.2f}",
            f"{ours['bytes'] / (1 << 30):.2f}",
            f"{theirs['bytes'] / (1 << 30):.2f}" if "stopped" not in theirs else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
