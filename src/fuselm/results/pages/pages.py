"""Pages from the package's templates, in HTML and Markdown, with the forms of numbers that they share.

Whatever a template puts in is shown as text: escaped for the language of the page, unless the template says `safe`.
"""

import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fuselm.system import foreign_text


def render(template: str, **context: Any) -> str:
    """Return one of the package's templates, filled in."""
    is_html = template.endswith(".html.jinja")
    environment = Environment(
        loader=FunctionLoader(
            lambda name: resources.files("fuselm.results").joinpath("templates", name).read_text(encoding="utf-8")
        ),
        autoescape=is_html,
        finalize=_show_in_html if is_html else _show_in_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bits": format_bits,
        "signed": format_signed,
        "minus": format_minus,
        "ratio": format_ratio,
        "percent": format_percent,
        "duration": format_duration,
        "name": last_name,
        "code": lambda text: Markup(foreign_text.write_code(text)),
        "prose": lambda text: Markup(foreign_text.escape_prose(text)),
    }
    return environment.get_template(template).render(**context)


def _show_in_html(value: Any) -> Any:
    """Escape what acts; the template engine escapes HTML."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return foreign_text.escape_controls(value, keep="\n")
    return value


def _show_in_markdown(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return foreign_text.escape_markdown(value)
    return value


def format_bits(value: float) -> str:
    """Return three decimals."""
    return f"{value:.3f}"


def format_signed(value: float) -> str:
    """Return four decimals with their sign."""
    return f"{round(value, 4) + 0.0:+.4f}"


def format_minus(value: float) -> str:
    """Return four decimals with a real minus sign."""
    return format_signed(value).replace("-", "−")


def format_interval(cell: Mapping, form: Callable[[float], str]) -> str:
    """Return a cell's interval; a dash where it is of too few documents to have one."""
    return "–" if cell["low"] is None else f"[{form(cell['low'])}, {form(cell['high'])}]"


def format_ratio(value: float | None) -> str:
    """Return three decimals; None is infinite."""
    return "∞" if value is None else f"{value:.3f}"


def format_percent(value: float) -> str:
    """Return percent with one decimal."""
    return f"{value:.1%}"


def format_duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def typeset(text: str) -> str:
    """Put real minus signs, and keep an interval on one line."""
    return re.sub(r"(\[\S+) ", "\\1\N{NO-BREAK SPACE}", re.sub(r"-(?=[ \d])", "−", text))


def last_name(model: str) -> str:
    """Return the last part of a hub id or path, without its ending."""
    return Path(model).name.removesuffix(".gguf")
