"""List what a template may read in place of a conversation that it refuses, and say what differs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fuselm.models.chat.message_forms import SYSTEM, TOOL, USER
from fuselm.models.chat.messages import Message

# docs/explanation/conversations.md has the same table.
DIFFERENCES = {
    "trimmed": "white space at a content's ends is left out; the token beside it is not aligned",
    "dropped": "a part of the content is left out, such as `<think>`; the rest is aligned",
    "rewritten": "the content is changed; what is left as it was is aligned",
    "missing": "nothing of the content is left as it was; the end of the turn is read, and not aligned",
    "merged": "a token has some of the template's text and some of the content's; it is not aligned",
    "no end": "no end token stands behind the content; this end is not aligned",
    "end added": "nothing stands behind the last content; the model's end token is put there",
    "control tokens": "a message has the name of a special token, which is read as text",
    "tool arguments": "the template wants arguments of tool calls as strings, and gets them",
    "roles merged": "neighbours of one role are refused, so they are read as one message",
    "tool as user": "tool results are refused, so they are read as a user's message",
    "system in user": "there is no system role, so the prompt stands before the first question",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Name something that a model reads otherwise than the conversation has it: `DIFFERENCES` says what `what` means.

    `message` is the place of the message in the conversation; None if it is not about one.
    """

    message: int | None
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """Hold a message that a template reads, and its place in the conversation; None if it has none there."""

    place: int | None
    message: Message
    parse_arguments: bool = True


def list_variants(
    messages: Sequence[Message], system: str | None, *, knows_system: bool
) -> Iterator[tuple[list[Numbered], list[Difference]]]:
    """Yield what a template may read instead of the messages, from the most faithful on, and the differences.

    `system` is the model's own system prompt, which stands in front of the conversation's.
    """
    base, differences = place_system(messages, system, knows_system=knows_system)
    yield base, differences
    if any("tool_calls" in m.extra for m in messages):
        yield [replace(n, parse_arguments=False) for n in base], [*differences, _note("tool arguments")]
    merged = merge_neighbours(base)
    if len(merged) < len(base):
        yield merged, [*differences, _note("roles merged")]
    if any(m.role == TOOL for m in messages):
        users = [
            replace(n, message=Message(role=USER, content=n.message.content)) if n.message.role == TOOL else n
            for n in base
        ]
        yield merge_neighbours(users), [*differences, _note("tool as user")]


def place_system(
    messages: Sequence[Message], system: str | None, *, knows_system: bool
) -> tuple[list[Numbered], list[Difference]]:
    """Return the messages with the model's own system prompt; without a system role, prompts are the user's words."""
    numbered = [Numbered(place=n, message=m) for n, m in enumerate(messages)]
    if system is not None:
        if numbered and numbered[0].message.role == SYSTEM:
            numbered[0] = _put_in_front(numbered[0], system)
        else:
            numbered.insert(0, Numbered(place=None, message=Message(role=SYSTEM, content=system)))
    prompt = "\n\n".join(n.message.content for n in numbered if n.message.role == SYSTEM and n.message.content)
    rest = [n for n in numbered if n.message.role != SYSTEM]
    if knows_system or len(rest) == len(numbered):
        return numbered, []
    first = next((i for i, n in enumerate(rest) if n.message.role == USER), None)
    if first is None:
        rest.insert(0, Numbered(place=None, message=Message(role=USER, content=prompt)))
    else:
        rest[first] = _put_in_front(rest[first], prompt)
    return rest, [_note("system in user")]


def merge_neighbours(numbered: Sequence[Numbered]) -> list[Numbered]:
    """Join neighbours that are both users' messages, or both of the system, with an empty line between them."""
    merged: list[Numbered] = []
    for item in numbered:
        before = merged[-1] if merged else None
        if before is not None and before.message.role == item.message.role and item.message.role in (USER, SYSTEM):
            merged[-1] = replace(before, message=_put_in_front(item, before.message.content).message)
        else:
            merged.append(item)
    return merged


def _put_in_front(item: Numbered, text: str) -> Numbered:
    content = "\n\n".join(part for part in (text, item.message.content) if part)
    return replace(item, message=replace(item.message, content=content))


def _note(what: str) -> Difference:
    return Difference(message=None, what=what)
