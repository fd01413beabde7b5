"""Render the package's templates, in HTML and Markdown.

Whatever a template inserts is shown as text: it is escaped for the language of the page, unless the template says
`safe`.
"""

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fuselm.results.pages import formats
from fuselm.system import foreign_text
from fuselm.system.durations import format_duration


def render_template(template: str, **context: Any) -> str:
    """Return one of the package's templates with the values of `context` filled in.

    Raises `jinja2.UndefinedError` where the template needs a value that is missing.
    """
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
        "bits": formats.format_bits,
        "signed": formats.format_signed,
        "minus": formats.format_minus,
        "ratio": formats.format_ratio,
        "percent": formats.format_percent,
        "duration": format_duration,
        "name": formats.shorten_model_name,
        "code": lambda text: Markup(foreign_text.write_code(text)),
        "prose": lambda text: Markup(foreign_text.escape_prose(text)),
    }
    return environment.get_template(template).render(**context)


def _show_in_html(value: Any) -> Any:
    """Escape control characters; the template engine escapes HTML."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return foreign_text.escape_controls(value, keep="\n")
    return value


def _show_in_markdown(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return foreign_text.escape_markdown(value)
    return value
