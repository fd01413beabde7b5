"""Choose the precision that a model is read and trained in: the fastest that is no less precise than its checkpoint.

A CPU without bf16 instructions multiplies bfloat16 matrices several times slower than float32 ones, and a CPU with them
four times faster. So the speeds are measured on matrices of real sizes, and remembered for the machine and device.
"""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fuselm.system import fingerprints, machine, progress

if TYPE_CHECKING:
    from fuselm.models.locating import Model

# A checkpoint of each type may be read in these types. Other checkpoints are read in their own: nothing that is as
# precise as float32 is faster.
AS_PRECISE = {"bfloat16": ("bfloat16", "float32"), "float16": ("float16", "float32")}
TRAINING_PRECISIONS = ("bf16", "float32")  # bf16 is autocast, with weights in float32
ROWS, INPUTS, OUTPUTS = 512, 576, 1536  # a product on a CPU has these sizes, as a batch of a small model
DEVICE_SIZE = 4096  # other devices multiply so many rows, inputs and outputs: a small product is all overhead
REPETITIONS = 4
SECONDS = 0.2  # no repetition begins after them
ROOM = 1.1  # a loaded model takes so many times the memory of its weights
# These variables decide which instructions torch, and the libraries under it, multiply with.
VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_DEBUG_CPU_TYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def choose_reading_dtype(model: "Model", *, device: str = "auto") -> str:
    """Return the dtype to read `model` in unless the user gives one; "auto" keeps the checkpoint's own."""
    own = find_checkpoint_dtype(model)
    if own not in AS_PRECISE:
        return "auto"
    if not _fits_in_float32(model, device):
        return own
    speeds = measure_speeds(device)["forward"]
    return max(AS_PRECISE[own], key=lambda dtype: speeds.get(dtype, 0.0))


def choose_training_precision(*, device: str = "auto") -> str:
    """Return the fastest of `TRAINING_PRECISIONS` on this machine."""
    speeds = measure_speeds(device)["training"]
    return max(TRAINING_PRECISIONS, key=lambda precision: speeds.get(precision, 0.0))


def find_checkpoint_dtype(model: "Model") -> str | None:
    """Return the type that transformers' dtype "auto" reads `model` in; None if the files do not say it."""
    config = json.loads((model.folder / "config.json").read_bytes())
    if config.get("quantization_config"):
        return None
    for section in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := section.get(key), str):
                return name.removeprefix("torch.")
    return _find_first_weight_type(model)


def _find_first_weight_type(model: "Model") -> str | None:
    """Return the type of the first floating-point weight of the first file, as transformers looks for it."""
    from safetensors import safe_open

    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    for file in sorted(model.folder.glob("model*.safetensors"))[:1]:
        with safe_open(file, "np") as weights:
            for name in weights.keys():  # noqa: SIM118
                if (found := names.get(weights.get_slice(name).get_dtype())) is not None:
                    return found
    return None


def _fits_in_float32(model: "Model", device: str) -> bool:
    """Tell whether memory has room for twice the checkpoint's bytes, or has no room for the checkpoint anyway."""
    free = _measure_free_memory(device)
    needed = ROOM * model.parameters_bytes
    return free is None or 2 * needed <= free or needed > free


def _measure_free_memory(device: str) -> int | None:
    import torch

    if _find_device_type(device) == "cuda":
        return torch.cuda.mem_get_info()[0]
    return machine.measure_available_memory()


def find_device() -> str:
    """Return the first of cuda, mps and cpu that this machine has."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def measure_speeds(device: str = "auto") -> dict[str, dict[str, float]]:
    """Return GFLOP/s of matrix products, `forward` by dtype and `training` (with the casts of autocast) by precision.

    Types that torch cannot multiply on the device are left out. The result is remembered for the facts that
    `_collect_machine_facts` returns.
    """
    key = _build_key(device)
    known = recall_speeds(device)
    if known is None:
        with progress.announce("measuring matrix products on this machine, once"):
            known = {"forward": _measure_forward_products(device), "training": _measure_training_products(device)}
        fingerprints.remember(key, known)
    return known


def recall_speeds(device: str = "auto") -> dict[str, dict[str, float]] | None:
    """Return what `measure_speeds` measured on this machine before; None if it did not yet."""
    known = fingerprints.recall(_build_key(device))
    return known if _is_measurement(known) else None


def _build_key(device: str) -> str:
    return f"precision {fingerprints.hash_lines(_collect_machine_facts(device))}"


def _is_measurement(value: Any) -> bool:
    tables = [value.get(name) for name in ("forward", "training")] if isinstance(value, dict) else [None]
    return all(isinstance(t, dict) and t and all(isinstance(v, float) for v in t.values()) for t in tables)


def _collect_machine_facts(device: str) -> list[str]:
    import torch

    facts = [
        _find_device_type(device),
        importlib.metadata.version("torch"),
        f"float32 {torch.get_float32_matmul_precision()}",
    ]
    if facts[0] == "cuda":
        return [*facts, torch.cuda.get_device_name(), str(torch.cuda.get_device_capability()), str(torch.version.cuda)]
    enabled = f"oneDNN {torch.backends.mkldnn.is_available()} {torch._C._get_mkldnn_enabled()}"
    settings = [f"{name}={os.environ.get(name, '')}" for name in VARIABLES]
    return [*facts, machine.hash_processor(), f"{torch.get_num_threads()} threads", enabled, *settings]


def _find_device_type(device: str) -> str:
    return find_device() if device == "auto" else device.partition(":")[0]


def _measure_forward_products(device: str) -> dict[str, float]:
    import torch

    rows, inputs, outputs = _choose_product_sizes(device)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    kind = _find_device_type(device)

    def make_product(dtype: torch.dtype) -> Callable[[], object]:
        factors = x.to(kind, dtype), w.to(kind, dtype)
        return lambda: torch.nn.functional.linear(*factors)

    makes = {name: lambda name=name: make_product(getattr(torch, name)) for name in ("bfloat16", "float16", "float32")}
    with torch.inference_mode():
        seconds = _time_fastest(makes, kind)
    return {name: 2 * rows * inputs * outputs / s / 1e9 for name, s in seconds.items()}


def _measure_training_products(device: str) -> dict[str, float]:
    import torch

    rows, inputs, outputs = _choose_product_sizes(device)
    kind = _find_device_type(device)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, inputs, generator=generator).to(kind).requires_grad_() for n in (rows, outputs))

    def run_step(enabled: bool) -> None:
        with torch.enable_grad(), torch.autocast(kind, torch.bfloat16, enabled=enabled):
            y = torch.nn.functional.linear(x, w)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))

    makes = {name: lambda name=name: lambda: run_step(name == "bf16") for name in TRAINING_PRECISIONS}
    return {name: 6 * rows * inputs * outputs / s / 1e9 for name, s in _time_fastest(makes, kind).items()}


def _choose_product_sizes(device: str) -> tuple[int, int, int]:
    return (ROWS, INPUTS, OUTPUTS) if _find_device_type(device) == "cpu" else (DEVICE_SIZE, DEVICE_SIZE, DEVICE_SIZE)


def _time_fastest(makes: dict[str, Callable[[], Callable[[], object]]], kind: str) -> dict[str, float]:
    """Time each work several times by turns, after one to warm up, and return the least seconds of each.

    On a CPU the seconds are those that this process worked, which other processes do not lengthen.
    """
    works = {}
    for name, make in makes.items():
        try:
            works[name] = make()
            works[name]()
        except (RuntimeError, TypeError):  # this device does not have the type
            works.pop(name, None)
    least: dict[str, float] = {}
    spent = dict.fromkeys(works, 0.0)
    for _ in range(REPETITIONS):
        for name, work in works.items():
            if spent[name] > SECONDS:
                continue
            began = _read_clock(kind)
            work()
            seconds = max(_read_clock(kind) - began, 1e-9)
            spent[name] += seconds
            least[name] = min(seconds, least.get(name, seconds))
    return least


def _read_clock(kind: str) -> float:
    import torch

    if kind == "cpu":
        return time.process_time()
    getattr(torch, kind).synchronize()
    return time.perf_counter()


def describe_device(device: str = "auto") -> list[Any]:
    """Return the device's name, and the name and measured speeds of each kind of product."""
    import torch

    name = torch.cuda.get_device_name() if _find_device_type(device) == "cuda" else machine.name_processor()
    each = " a core" if _find_device_type(device) == "cpu" else ""
    speeds = measure_speeds(device).items()
    return [
        name,
        *((f"{kind}{each}", ", ".join(f"{n} {s:,.0f}" for n, s in by_name.items())) for kind, by_name in speeds),
    ]
