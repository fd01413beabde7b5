"""Ask a template what it knows, with conversations of our own: the system role, and what it writes behind a content."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuselm.models.chat.message_forms import ASSISTANT, SYSTEM, USER
from fuselm.models.chat.rendering import TemplateRefusal

_ROLES = ((USER, ASSISTANT, USER, ASSISTANT), (USER, ASSISTANT))
_WORDS = ("Qzajxa", "Qzbjxb", "Qzcjxc", "Qzdjxd")
_SYSTEM_WORD = "Qzsjxs"

Render = Callable[[Sequence[Sequence[dict[str, Any]]]], Sequence[str | ValueError]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Hold what a template writes around the contents of a conversation of users and assistants in turn.

    `parts` stand before, between and behind the contents. `knows_system` tells whether it writes a system prompt.
    """

    text: str
    parts: tuple[str, ...]
    knows_system: bool

    @property
    def middle(self) -> tuple[str, ...]:
        """Return what stands behind the first question and the first answer; a last answer may have more before it."""
        return self.parts[1:3] if len(self.parts) > 3 else ()


def probe_template(render: Render) -> Probe | None:
    """Return what a template writes; None if it writes no contents.

    Raises `TemplateRefusal` if it refuses a question and its answer.
    """
    asked = [_build(roles) for roles in _ROLES] + [[{"role": SYSTEM, "content": _SYSTEM_WORD}, *_build(_ROLES[1])]]
    *texts, with_system = render(asked)
    knows_system = isinstance(with_system, str) and _SYSTEM_WORD in with_system
    refusal: ValueError = TemplateRefusal("writes nothing")
    for roles, text in zip(_ROLES, texts, strict=True):
        if isinstance(text, ValueError):
            refusal = text
            continue
        parts, rest = [], text
        for word in _WORDS[: len(roles)]:
            before, found, rest = rest.partition(word)
            parts.append(before)
            if not found:
                return None
        return Probe(text=text, parts=(*parts, rest), knows_system=knows_system)
    raise refusal


def _build(roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": word} for role, word in zip(roles, _WORDS, strict=False)]
