"""Render chat templates in a process that can open no file, start no process and take little memory.

A template comes with a model and is code. Jinja's sandbox keeps it from Python's internals; the limits of this process
keep it from files, and its parent ends it if it takes too long. Requests and answers are lines of JSON.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

DATE = datetime(2024, 7, 26)  # every template's today, so that a capture can be made again; Llama 3's own default
MOST_MEMORY = 1 << 30  # bytes
MOST_OUTPUT = 1 << 26  # characters of a conversation


class GenerationExtension(jinja2.ext.Extension):
    """Know `{% generation %}`, by which a template marks what the assistant writes."""

    tags = frozenset({"generation"})
    spans: list[tuple[int, int]]

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(mark_generation=self.mark)

    def parse(self, parser: Any) -> jinja2.nodes.CallBlock:
        """Turn the block into a call that notes where its text begins and ends."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark", []), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return self.mark(caller())

    def mark(self, text: str) -> str:
        """Return the text of a block; `render` puts in marks."""
        return f"{MARKS[0]}{text}{MARKS[1]}" if MARKS else text


MARKS: list[str] = []  # what is written before and behind a marked block; empty: nothing


class _Dict:
    """Make dictionaries for templates, which must not reach the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


def raise_exception(message: object) -> None:
    """Refuse a conversation, as templates do."""
    raise jinja2.TemplateError(str(message))


def dump_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Return JSON without HTML's escapes, as transformers does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def build_environment() -> jinja2.Environment:
    """Build the environment that transformers gives to chat templates, with a fixed date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationExtension, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = dump_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = DATE.strftime
    environment.globals["dict"] = _Dict()
    return environment


def render(template: jinja2.Template, request: dict[str, Any]) -> list[tuple[str | None, str]]:
    """Return each conversation of a request as text, or None and what is wrong with it."""
    MARKS[:] = request["marks"]
    answers: list[tuple[str | None, str]] = []
    for messages in request["conversations"]:
        try:
            answers.append((_write(template, messages, request["names"]), ""))
        except (Exception, RecursionError) as error:
            answers.append((None, describe_error(error)))
    return answers


def _write(template: jinja2.Template, messages: list, names: dict[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(messages=messages, **names):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_OUTPUT:
            raise ValueError(f"wrote more than {MOST_OUTPUT:,} characters")
    return "".join(pieces)


def describe_error(error: BaseException) -> str:
    """Return one line that says what stopped a template."""
    if isinstance(error, MemoryError):
        return f"took more than {MOST_MEMORY >> 20} MB of memory"
    text = " ".join(str(error).split())[:500] or "no message"
    return text if isinstance(error, jinja2.TemplateError | ValueError) else f"{type(error).__name__}: {text}"


def limit_process() -> None:
    """Forbid this process to open files, to write any and to start processes, and bound its memory."""
    import resource

    limits = {"RLIMIT_AS": MOST_MEMORY, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 0}
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system may lack one
            resource.setrlimit(getattr(resource, name), (limit, limit))


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    environment = build_environment()
    for text in ("{{ [1, 2]|map('string')|join|tojson|upper|pprint|urlize }}", "{{ raise_exception('') }}", "{% if %}"):
        with contextlib.suppress(jinja2.TemplateError):  # they import what rendering needs
            environment.from_string(text).render()
    templates: dict[str, jinja2.Template] = {}
    limit_process()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            source = request["template"]
            if source not in templates:
                templates[source] = environment.from_string(source)
            answer: dict[str, Any] = {"texts": render(templates[source], request)}
        except (Exception, RecursionError, MemoryError) as error:
            answer = {"error": describe_error(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
