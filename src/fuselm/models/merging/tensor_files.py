"""Read the tensors of a model folder in blocks of rows, and write others as sharded safetensors files, block by block.

A LoRA adapter may stand on a model: then its tensors are read as if it had been merged into them.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from fuselm.models import checkpoints
from fuselm.models.locating import Model
from fuselm.system.background import Background

DTYPES = {
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float64": ("F64", torch.float64),
}
AHEAD = 4  # blocks that wait to be written
SHARD_BYTES = 2 << 30  # a shard is written whole or not at all, so this is what an interruption costs at most
_WHOLE = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"}
_BY_CODE = {code: name for name, (code, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Describe a tensor of a folder."""

    shape: tuple[int, ...]
    dtype: str  # one of `DTYPES`
    file: Path
    begin: int  # its first byte in the file


class TensorFolder:
    """Read the tensors of a located model, and of a LoRA adapter on it.

    Whole numbers, such as positions, are left out: transformers makes them. Raises `ValueError` if the weights are not
    in safetensors files, are quantised, or the adapter is not a plain LoRA of this model.
    """

    def __init__(self, model: Model, adapter: Path | None = None):
        self.model = model
        self.tensors: dict[str, TensorInfo] = {}
        self.config = checkpoints.read_json(model.folder / "config.json")
        for file in checkpoints.list_weight_files(model.folder, self.config):
            if file.suffix != ".safetensors":
                raise ValueError(
                    f"{model.name}: its weights are in {file.name}; load it with transformers and save it again, which "
                    "writes safetensors"
                )
            for name, described, begin in _read_header(file):
                if (code := described["dtype"]) in _BY_CODE:
                    shape = tuple(described["shape"])
                    self.tensors[name] = TensorInfo(shape=shape, dtype=_BY_CODE[code], file=file, begin=begin)
                elif code not in _WHOLE or name.endswith("weight"):
                    raise ValueError(
                        f"{model.name}: {name} is of type {code}, so the weights are quantised; load the model with "
                        "transformers, call dequantize(), and save it again"
                    )
        self._adapter = None if adapter is None else _Adapter(adapter, self.tensors)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Float[Tensor, "rows *rest"]:
        """Return rows of a tensor in float32; a number by itself is a row."""
        info = self.tensors[name]
        shape = info.shape or (1,)
        stop = shape[0] if end is None else min(end, shape[0])
        row = math.prod(shape[1:]) * DTYPES[info.dtype][1].itemsize
        data = torch.empty((stop - begin) * row, dtype=torch.uint8)
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.begin + begin * row)
            if _fill(file, data.numpy().data) < len(data):
                raise ValueError(f"{info.file}: ends inside of {name}; download the model again")
        rows = data.view(DTYPES[info.dtype][1]).reshape(stop - begin, *shape[1:]).float()
        return rows if self._adapter is None else self._adapter.add(name, rows, begin)


def _read_header(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield the name, the description and the first byte of each tensor of a safetensors file."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    for name, described in header.items():
        if name != "__metadata__":
            yield name, described, 8 + length + described["data_offsets"][0]


def _fill(file: RawIOBase, data: memoryview) -> int:
    """Fill `data` from a file, which returns at most 2 GiB at a time; return how many bytes there were."""
    done = 0
    while done < len(data) and (count := file.readinto(data[done:])):
        done += count
    return done


class _Adapter:
    """Hold a LoRA adapter's factors: W + scale B A, Hu et al. 2021."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]):
        config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        config = checkpoints.read_json(config_file)
        unusual = {
            "peft_type": config.get("peft_type") != "LORA",
            "use_dora": config.get("use_dora"),
            "bias": config.get("bias", "none") != "none",
            "modules_to_save": config.get("modules_to_save"),
            "fan_in_fan_out": config.get("fan_in_fan_out"),
        }
        if wrong := [name for name, is_unusual in unusual.items() if is_unusual]:
            raise ValueError(
                f"{config_file}: {wrong[0]} is {config.get(wrong[0])!r}, and only plain LoRA is merged here; merge the "
                "adapter with peft (merge_and_unload) and name the folder that it saves"
            )
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        with safe_open(weights, framework="pt") as opened:
            found = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118, it is no mapping
        for name in [name for name in found if name.endswith(".lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            target = module.removeprefix("base_model.model.") + ".weight"
            a, b = found.pop(name), found.pop(f"{module}.lora_B.weight", None)
            shape = tensors[target].shape if target in tensors else None
            if b is None or shape != (b.shape[0], a.shape[1]):
                raise ValueError(f"{weights}: {module} does not fit the model; name the adapter's own base model")
            self._factors[target] = (a, b * _scale(config, module, a.shape[0]))
        if found:
            raise ValueError(
                f"{weights}: has {min(found)}, and only LoRA of linear layers is merged here; merge the adapter with "
                "peft (merge_and_unload) and name the folder that it saves"
            )

    def add(self, name: str, rows: Float[Tensor, "rows *rest"], begin: int) -> Float[Tensor, "rows *rest"]:
        if name not in self._factors:
            return rows
        a, b = self._factors[name]
        return rows + b[begin : begin + len(rows)] @ a


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    def find(pattern: str, usual: int | float) -> int | float:
        named = config.get(pattern) or {}
        return next((value for key, value in named.items() if module == key or module.endswith(f".{key}")), usual)

    alpha, r = find("alpha_pattern", config.get("lora_alpha", 8)), find("rank_pattern", config.get("r", rank))
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Plan a file: its name, and its tensors with their shapes and types, in order."""

    name: str
    tensors: Mapping[str, tuple[tuple[int, ...], str]]


def plan_shards(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], limit: int = SHARD_BYTES
) -> tuple[list[Shard], dict[str, Any] | None]:
    """Spread tensors over files of at most `limit` bytes where a tensor is not larger; return the index of several."""
    groups: list[dict[str, tuple[tuple[int, ...], str]]] = [{}]
    used = 0
    for name, (shape, dtype) in tensors.items():
        size = count_bytes(shape, dtype)
        if used and used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = (shape, dtype)
        used += size
    if len(groups) == 1:
        return [Shard(name="model.safetensors", tensors=groups[0])], None
    names = [f"model-{n + 1:05}-of-{len(groups):05}.safetensors" for n in range(len(groups))]
    total = sum(count_bytes(*of) for of in tensors.values())
    weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return [Shard(name=n, tensors=g) for n, g in zip(names, groups, strict=True)], index


def count_bytes(shape: Iterable[int], dtype: str) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype][1].itemsize


def write_shard(path: Path, shard: Shard, blocks: Iterator[Float[Tensor, "rows *rest"]]) -> str:
    """Write a safetensors file from the blocks of its tensors, in order, and return its SHA-256 in hex digits.

    A thread writes and hashes while the next blocks are made. Raises `ValueError` if they do not fit.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shard.tensors.items():
        size = count_bytes(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    checksum = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            checksum.update(data)

        with Background(write, ahead=AHEAD) as writer:
            writer.put(struct.pack("<Q", len(encoded)) + encoded)
            for name, (shape, dtype) in shard.tensors.items():
                left = count_bytes(shape, dtype)
                while left > 0:
                    data = next(blocks).to(DTYPES[dtype][1]).contiguous().view(torch.uint8).numpy()
                    writer.put(data.data)
                    left -= data.nbytes
                if left:
                    raise ValueError(f"{path}: {name} has more rows than its shape {shape} says")
    return checksum.hexdigest()
