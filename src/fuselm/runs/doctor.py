"""Find out what this machine has for fuselm, and say what to fix: versions, devices, memory, disk, caches, extras.

With a run file, its servers are asked for their models, and what its options need is looked for.
"""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fuselm.models import precision
from fuselm.runs import config
from fuselm.system import compiling, fingerprints, machine
from fuselm.system.local_copies import find_disk
from fuselm.system.remote_paths import open_path

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "numba", "pyarrow", "pydantic")
OWN_EXTRAS = ("test", "docs", "peers")  # for work on fuselm itself
GIB = 1 << 30
LEAST_MEMORY, LEAST_DISK = 4 * GIB, 5 * GIB  # below them, a small run may fail
PATIENCE = 5.0  # seconds to wait for a server's list of models
WARM_UP = "python -m fuselm.cli.warm_up"


def examine(run_file: Path | None = None) -> dict[str, Any]:
    """Return what is here, by topic, and what to do about it.

    `problems` keep fuselm, or the run of `run_file`, from working; `advice` makes it faster. Each is a line.
    """
    run = None if run_file is None else config.load(run_file)
    found: dict[str, Any] = {
        "versions": read_versions(),
        "machine": examine_machine(),
        "devices": examine_devices(),
        "precision": examine_precision(),
        "disk": examine_disk(open_path(run.output) if run is not None else Path.cwd()),
        "caches": measure_caches(),
        "kernels": {"seconds_to_compile": sum(map(compiling.estimate_seconds, compiling.STAGES))},
        "extras": examine_extras(),
        "servers": {} if run is None else {name: ask_server(s) for name, s in run.sources.items() if _is_server(s)},
    }
    return found | {"problems": list(list_problems(found, run)), "advice": list(list_advice(found))}


def read_versions() -> dict[str, str]:
    """Return the versions of fuselm, Python and the packages that matter most."""
    versions = {"fuselm": importlib.metadata.version("fuselm"), "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in PACKAGES}


def examine_machine() -> dict[str, Any]:
    """Return the processor, its cores, and the memory in bytes that can be taken; None where that is not known."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": machine.name_processor(),
        "usable_cores": machine.count_usable_cores(),
        "free_cores": machine.count_free_cores(),
        "available_memory": machine.measure_available_memory(),
    }


def examine_devices() -> list[dict[str, Any]]:
    """Return each device that models can run on, the one that they do run on first, with its memory in bytes."""
    import torch

    devices: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        devices.append({"device": f"cuda:{number}", "name": facts.name, "memory": facts.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.machine(), "memory": None})
    return [*devices, {"device": "cpu", "name": machine.name_processor(), "memory": None}]


def examine_precision() -> dict[str, Any]:
    """Return the speeds that were measured on this machine, or None before the first run, and what bf16 looks like."""
    return {"bf16_instructions": machine.has_bf16_instructions(), "measured": precision.recall_speeds()}


def examine_disk(output: Path) -> dict[str, dict[str, Any]]:
    """Return the free bytes of the folder for a run's output and of the caches, and whether they can be written."""
    places = {"output": output, "cache": fingerprints.find_cache_folder(), "hub": _find_hub_cache()}
    return {name: _examine_folder(path) for name, path in places.items()}


def _examine_folder(path: Path) -> dict[str, Any]:
    above = find_disk(path)
    is_writable = above.is_dir() and os.access(above, os.W_OK)
    return {"folder": str(path), "free": shutil.disk_usage(above).free, "is_writable": is_writable}


def measure_caches() -> dict[str, dict[str, Any]]:
    """Return the folder and the bytes of each part of fuselm's cache, and of the Hub's."""
    own = fingerprints.find_cache_folder()
    parts = {path.name: path for path in sorted(own.iterdir()) if path.is_dir()} if own.is_dir() else {}
    return {
        name: {"folder": str(path), "bytes": _measure_folder(path)}
        for name, path in (parts | {"hub": _find_hub_cache()}).items()
    }


def _measure_folder(folder: Path) -> int:
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files if not file.is_symlink() and file.exists())


def _find_hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def examine_extras() -> dict[str, dict[str, Any]]:
    """Return the optional extras of fuselm: which packages of each are missing, and the line that installs it."""
    metadata = importlib.metadata.metadata("fuselm")
    extras: dict[str, dict[str, Any]] = {}
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra in OWN_EXTRAS:
            continue
        needed = [
            line for line in metadata.get_all("Requires-Dist") or [] if re.search(rf"extra == ['\"]{extra}['\"]", line)
        ]
        names = [re.match(r"[\w.-]+", line)[0] for line in needed]  # type: ignore[index]
        missing = [name for name in names if not _is_installed(name)]
        extras[extra] = {"missing": missing, "install": f"pip install 'fuselm[{extra}]'"}
    return extras


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_server(source: Any) -> bool:
    return isinstance(source, config.ServerOptions)


def ask_server(options: config.ServerOptions) -> dict[str, Any]:
    """Ask a server, once, for its list of models. Return its address, and what is wrong: None if it has the model."""
    from fuselm.sources.servers import client, listing

    found: dict[str, Any] = {"server": options.server, "model": options.model, "problem": None}
    try:
        asked = client.open_client(
            options.server,
            key_env=options.key_env,
            timeout=PATIENCE,
            requests=1,
            key_over_http=options.key_over_http,
        )
        try:
            answer = client.ask(asked, "models", attempts=1)
            with client.name_server(asked):
                listing.find_model(answer, options.model, asked.key)
        finally:
            asked.close()
    except ValueError as error:
        found["problem"] = str(error)
    return found


def format_size(count: int | None) -> str:
    """Return bytes as GiB or MiB; a dash if nobody knows."""
    if count is None:
        return "–"
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


def list_problems(found: Mapping[str, Any], run: config.RunOptions | None) -> Iterator[str]:
    """Yield what keeps fuselm, or the run, from working, and what to do about it."""
    for name, place in found["disk"].items():
        variable = {"cache": "set FUSELM_CACHE", "hub": "set HF_HOME", "output": "set another `output`"}[name]
        if not place["is_writable"]:
            yield f"{place['folder']}: cannot be written; {variable} to a folder that can"
    for name, server in found["servers"].items():
        if server["problem"] is not None:
            yield f"sources.{name}: {server['problem']}"
    if run is None:
        return
    needs = {
        "lora": ("train.lora_rank", run.train.lora_rank is not None),
        "qlora": ("train.quantize", run.train.quantize is not None),
        "wandb": ("train.trackers", "wandb" in run.train.trackers),
        "ray": ("capture.engine", run.capture.engine == "ray"),
        "vllm": ("capture.engine", run.capture.engine == "vllm"),
    }
    for extra, (option, is_used) in needs.items():
        of = found["extras"].get(extra, {"missing": []})
        if is_used and of["missing"]:
            yield f"{option}: needs {', '.join(of['missing'])}, not installed here; {of['install']}"


def list_advice(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would make fuselm faster here, and what may become short."""
    memory = found["machine"]["available_memory"]
    if memory is not None and memory < LEAST_MEMORY:
        yield f"memory: {format_size(memory)} can be taken, little for a run; close other programs"
    for place in found["disk"].values():
        if place["free"] < LEAST_DISK:
            yield f"{place['folder']}: {format_size(place['free'])} free, little for a run; make room, or move it"
    if (seconds := found["kernels"]["seconds_to_compile"]) > 0:
        yield f"kernels: not compiled yet; the first run takes {seconds:.0f} s longer, or run `{WARM_UP}` now"
    if found["devices"][0]["device"] == "cpu" and list(Path("/dev").glob("nvidia[0-9]*")):
        yield "devices: there is an NVIDIA GPU that torch cannot use; install torch with CUDA, see pytorch.org"
    if found["devices"][0]["device"] == "cpu" and found["precision"]["bf16_instructions"] is False:
        yield "precision: the processor has no bf16 instructions, so models are read and trained in float32, slower"
