"""Render a model's own template: with its names, its tools, and contents in parts where it takes no strings."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuselm.models.chat import rendering
from fuselm.models.chat.templates import Template

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKS = ("\U0010fefe<", ">\U0010fefe")

Form = Mapping[str, Any]  # a message as templates read it


class Prompting:
    """Render conversations for one model.

    `in_parts` tells whether contents are lists of parts, as a few templates need.
    """

    def __init__(self, name: str, template: Template, *, in_parts: bool = False):
        self.name, self.template, self.in_parts = name, template, in_parts

    def render(
        self, conversations: Sequence[Sequence[Form]], tools: Sequence[Form] | None = None, *, mark: bool = False
    ) -> list[str | rendering.TemplateRefusal]:
        """Return each conversation as text, or why the template refuses it.

        `mark` puts marks around what the template says that the assistant generates.
        """
        names = {**self.template.names, "add_generation_prompt": False, "tools": tools or None}
        if self.in_parts:
            conversations = [[_put_in_parts(form) for form in forms] for forms in conversations]
        try:
            return rendering.render(self._choose(tools), conversations, names, marks=_MARKS if mark else None)
        except ValueError as error:
            raise type(error)(f"{self.name}: its chat template cannot be used: {error}") from None

    def bind(self, forms: Sequence[Form], tools: Sequence[Form] | None) -> Callable[..., list]:
        """Return a function that renders these messages with other contents."""
        return lambda texts: self.render(
            [[{**form, "content": c} for form, c in zip(forms, contents, strict=True)] for contents in texts], tools
        )

    def find_generated(self, forms: Sequence[Form], tools: Sequence[Form] | None, text: str) -> list[tuple[int, int]]:
        """Return where a rendered text has what the template marks as generated; nothing if it marks nothing."""
        if not GENERATION.search(self._choose(tools)):
            return []
        marked = self.render([forms], tools, mark=True)[0]
        if isinstance(marked, ValueError):
            return []
        spans, position, begin = [], 0, 0
        for part in re.split(f"({re.escape(_MARKS[0])}|{re.escape(_MARKS[1])})", marked):
            if part == _MARKS[0]:
                begin = position
            elif part == _MARKS[1]:
                spans.append((begin, position))
            else:
                position += len(part)
        return spans if position == len(text) else []

    def _choose(self, tools: Sequence[Form] | None) -> str:
        return self.template.with_tools if tools and self.template.with_tools else self.template.text


def _put_in_parts(form: Form) -> Form:
    return {**form, "content": [{"type": "text", "text": form["content"]}]}
