"""Check what a GGUF file claims against its size, before a reader believes it.

A length of 2^60 in a file of a few kilobytes keeps a reader busy forever. The layout is that of docs/gguf.md in ggml.
"""

import struct
from pathlib import Path
from typing import BinaryIO

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value: its bytes
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)  # versions that have this layout
LEAST_TENSOR = 24  # a tensor's name, shape, type and place take so many bytes
MOST_DIMENSIONS = 4


def check_gguf_claims(path: Path) -> None:
    """Raise `ValueError` if the metadata or the list of tensors does not fit into the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(4)
        (version,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
        if version not in VERSIONS:
            return  # it has another byte order, or the reader refuses it
        tensors, fields = _read_count(file, size), _read_count(file, size)
        for _ in range(fields):
            _skip_bytes(file, size, _read_count(file, size))
            _skip_value(file, size, _read_type(file))
        if tensors * LEAST_TENSOR > size:
            raise ValueError(f"it claims {tensors} tensors and has {size} bytes")
        for _ in range(tensors):
            _skip_bytes(file, size, _read_count(file, size))
            dimensions = _read_type(file)
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"it claims a tensor of {dimensions} dimensions")
            _skip_bytes(file, size, 8 * dimensions + 4 + 8)


def _skip_value(file: BinaryIO, size: int, kind: int) -> None:
    if kind == STRING:
        _skip_bytes(file, size, _read_count(file, size))
    elif kind == ARRAY:
        of, count = _read_type(file), _read_count(file, size)
        if of == STRING:
            for _ in range(count):
                _skip_bytes(file, size, _read_count(file, size))
        else:
            _skip_bytes(file, size, count * _find_size(of))
    else:
        _skip_bytes(file, size, _find_size(kind))


def _find_size(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"a value has the type {kind}, which does not exist")
    return SIZES[kind]


def _read_type(file: BinaryIO) -> int:
    data = file.read(4)
    if len(data) < 4:
        raise ValueError("the file ends within its metadata")
    return struct.unpack("<I", data)[0]


def _read_count(file: BinaryIO, size: int) -> int:
    """Read a count or a length. Raises `ValueError` for one that is larger than the file."""
    data = file.read(8)
    if len(data) < 8:
        raise ValueError("the file ends within its metadata")
    (number,) = struct.unpack("<Q", data)
    if number > size:
        raise ValueError(f"it claims {number} values and has {size} bytes")
    return number


def _skip_bytes(file: BinaryIO, size: int, count: int) -> None:
    if file.seek(count, 1) > size:
        raise ValueError("the file ends within its metadata")
