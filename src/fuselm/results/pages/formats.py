"""Format numbers, names and settings in the way that all pages and tables share."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def format_bits(value: float) -> str:
    """Format bits per byte with three decimals."""
    return f"{value:.3f}"


def format_signed(value: float) -> str:
    """Format a difference with four decimals and its sign."""
    return f"{round(value, 4) + 0.0:+.4f}"


def format_minus(value: float) -> str:
    """Format a difference with four decimals and a typographic minus sign."""
    return format_signed(value).replace("-", "−")


def format_interval(cell: Mapping, form: Callable[[float], str]) -> str:
    """Format the interval of a cell with `low` and `high`; return a dash where both are None.

    `form` formats one of its ends.
    """
    return "–" if cell["low"] is None else f"[{form(cell['low'])}, {form(cell['high'])}]"


def format_ratio(value: float | None) -> str:
    """Format a number with three decimals; None stands for an infinite one."""
    return "∞" if value is None else f"{value:.3f}"


def format_percent(value: float) -> str:
    """Format a share as percent with one decimal."""
    return f"{value:.1%}"


def typeset(text: str) -> str:
    """Set typographic minus signs, and keep an interval on one line."""
    return re.sub(r"(\[\S+) ", "\\1\N{NO-BREAK SPACE}", re.sub(r"-(?=[ \d])", "−", text))


def shorten_model_name(model: str) -> str:
    """Return the last part of a hub id or path, without the ending of a GGUF file."""
    return Path(model).name.removesuffix(".gguf")


def describe_settings(settings: Mapping[str, Any]) -> str:
    """List options with their values, without `train.` before their names."""
    return ", ".join(f"{name.removeprefix('train.')} {value}" for name, value in settings.items())
