"""Read JSON as people write rows: one object per line, or one list of objects, however it is laid out."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_INTEGER = 4000  # digits; Python refuses longer ones, and no row needs them


def _parse_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_integer)


def read_records(file: Path, blocks: Iterable[str], *, may_span_lines: bool) -> Iterator[tuple[str, Any]]:
    """Yield each value with its file and line, from a file's text in blocks that end where a line ends.

    A list is read whole. `may_span_lines` says whether a single object may fill the whole file. Raises `ValueError`,
    with the line, if something is not JSON.
    """
    blocks, content, begin = iter(blocks), "", 0
    for block in blocks:
        content += block
        begin = _skip_space(content, 0)
        if begin < len(content):
            break
    if content.startswith("[", begin):
        yield from _read_list(file, content + "".join(blocks), begin + 1)
    elif may_span_lines and _spans_lines(content, begin):
        yield _read_whole(file, content + "".join(blocks), begin)
    else:
        yield from _read_lines(file, itertools.chain([content], blocks))


def _split_lines(blocks: Iterable[str]) -> Iterator[str]:
    for block in blocks:
        if "\r" in block:  # never within a JSON string
            block = block.replace("\r\n", "\n").replace("\r", "\n")
        yield from block.removesuffix("\n").split("\n")


def _read_lines(file: Path, blocks: Iterable[str]) -> Iterator[tuple[str, Any]]:
    needed, name, scan = "one object a line is needed", str(file), _DECODER.scan_once
    for number, line in enumerate(_split_lines(blocks), 1):
        try:
            value, end = scan(line, 0)
        except (StopIteration, ValueError, RecursionError):
            end = -1
        if end == len(line):
            yield f"{name}:{number}", value
            continue
        line = line.strip("\ufeff")  # concatenated files each have a byte order mark
        if line.strip():
            value, end = _parse(file, line, _skip_space(line, 0), needed, first_line=number)
            _check_end(file, line, end, needed, first_line=number)
            yield f"{file}:{number}", value


def _read_list(file: Path, content: str, at: int) -> Iterator[tuple[str, Any]]:
    needed = "a list of objects is needed"
    line, counted = 1, 0
    at = _skip_space(content, at)
    while not content.startswith("]", at):
        line, counted = line + content.count("\n", counted, at), at
        value, end = _parse(file, content, at, needed)
        yield f"{file}:{line}", value
        at = _skip_space(content, end)
        if content.startswith(",", at):
            at = _skip_space(content, at + 1)
            if content.startswith("]", at):
                raise ValueError(f"{file}:{_find_line(content, at)}: not JSON (a comma before the end); {needed}")
        elif not content.startswith("]", at):
            what = "the list has no end" if at == len(content) else "no comma between two objects"
            raise ValueError(f"{file}:{_find_line(content, end)}: not JSON ({what}); {needed}")
    _check_end(file, content, at + 1, needed)


def _read_whole(file: Path, content: str, begin: int) -> tuple[str, Any]:
    needed = "one object, a list of objects, or an object a line is needed"
    value, end = _parse(file, content, begin, needed)
    _check_end(file, content, end, needed)
    return f"{file}:{_find_line(content, begin)}", value


def _spans_lines(content: str, begin: int) -> bool:
    """Return whether the first line is not a complete value, as in a file that is laid out over several lines."""
    end = content.find("\n", begin)
    try:
        _DECODER.raw_decode(content[begin : end if end >= 0 else len(content)])
    except (ValueError, RecursionError):
        return end >= 0
    return False


def _parse(file: Path, content: str, at: int, needed: str, *, first_line: int = 1) -> tuple[Any, int]:
    """Return the value that begins at `at`, and the position where it ends."""
    try:
        return _DECODER.raw_decode(content, at)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{file}:{line}: not JSON ({error.msg}: column {error.colno}); {needed}") from None
    except RecursionError:
        raise ValueError(f"{file}:{first_line + _find_line(content, at) - 1}: nested too deeply; {needed}") from None


def _check_end(file: Path, content: str, end: int, needed: str, *, first_line: int = 1) -> None:
    end = _skip_space(content, end)
    if end < len(content):
        line = first_line + _find_line(content, end) - 1
        raise ValueError(f"{file}:{line}: not JSON (more after the end: {content[end : end + 20]!a}); {needed}")


def _skip_space(content: str, at: int) -> int:
    match = _SPACE.match(content, at)
    assert match is not None
    return match.end()


def _find_line(content: str, at: int) -> int:
    return content.count("\n", 0, at) + 1
