"""Read the bytes of text files block by block, decompressed and decoded, and say what is wrong with those that are not.

Only what a format needs whole, such as a list in JSON, is read whole.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fuselm.documents.text_files import COMPRESSED

BLOCK = 1 << 20
_MARK = b"\xef\xbb\xbf"  # a byte order mark in UTF-8


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Open a file's bytes, decompressed if it is compressed. Raises `ValueError` if they cannot be decompressed."""
    how = COMPRESSED.get(file.suffix.lower())
    if how is None:
        with file.open("rb") as opened:
            yield opened
        return
    try:
        with file.open("rb") as raw, _decompress(raw, how) as opened:
            yield opened
    except (PermissionError, FileNotFoundError):
        raise
    except UndecodableError:
        raise
    except Exception as error:  # each library has errors of its own for damage
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{file}: cannot be decompressed as {how} ({said}); write the file again") from None


@contextlib.contextmanager
def open_counted(file: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file's bytes, decompressed, with a function that says how many bytes on disk were read for them."""
    how = COMPRESSED.get(file.suffix.lower())
    with file.open("rb") as raw:
        if how is None:
            yield raw, raw.tell
        else:
            with _decompress(raw, how) as opened:
                yield opened, raw.tell


class UndecodableError(ValueError):
    """Say that the bytes of a file are no text in UTF-8."""


def _decompress(raw: Any, how: str) -> Any:
    if how == "xz":
        import lzma

        return lzma.open(raw)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), how))


def read_text_blocks(file: Path) -> Iterator[str]:
    """Yield a file's text in blocks, each up to the end of a line. Raises `ValueError` if it is no text."""
    with open_bytes(file) as opened:
        done, lines, rest = 0, 0, b""
        while True:
            block = opened.read(BLOCK)
            data = rest + block
            if not done:
                _check_encoding(file, data)
            end = data.rfind(b"\n") + 1 if block else len(data)
            if end or not block:
                begin = len(_MARK) if not done and data.startswith(_MARK) else 0
                yield _decode(file, data[:end], begin, done, lines)
                done, lines, rest = done + end, lines + data.count(b"\n", 0, end), data[end:]
            else:
                rest = data
            if not block:
                return


def _decode(file: Path, data: bytes, begin: int, before: int, lines: int) -> str:
    try:
        return data[begin:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = begin + error.start
        line = lines + data.count(b"\n", 0, at) + 1
        raise UndecodableError(
            f"{file}:{line}: not UTF-8 (byte {before + at} is {data[at]:#x}); convert it, say from Latin-1: "
            "iconv -f LATIN1 -t UTF-8"
        ) from None


def _check_encoding(file: Path, data: bytes) -> None:
    if _is_binary(data):
        raise UndecodableError(f"{file}: binary, not text; drop it, or name the texts without it")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise UndecodableError(f"{file}: UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")


def _is_binary(data: bytes) -> bool:
    """Tell whether a file's beginning is neither UTF-8 nor looks like text in another encoding.

    Text in UTF-16 or UTF-32 has zero bytes in every second or fourth place, and other control characters nowhere.
    """
    begin = data[:4096]
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    controls = sum(byte < 32 and byte not in b"\0\t\n\f\r\x1b" for byte in begin)
    if controls <= len(begin) // 50:
        return False
    try:
        begin.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(begin) - 4
    return False
