"""Turn messages into what chat templates read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fuselm.models.chat.messages import Message

ASSISTANT, USER, SYSTEM, TOOL = "assistant", "user", "system", "tool"
_OURS = ("weight",)  # fields of a message that say how it is used


def build_form(message: Message, *, parse_arguments: bool = True) -> dict[str, Any]:
    """Return a message as templates read it. Arguments of tool calls become objects if they are JSON in a string."""
    extra = {name: value for name, value in message.extra.items() if name not in _OURS}
    if parse_arguments and isinstance(calls := extra.get("tool_calls"), Sequence) and not isinstance(calls, str):
        extra["tool_calls"] = [_parse_arguments(call) for call in calls]
    return {**extra, "role": message.role, "content": message.content}


def _parse_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("arguments"), str):
        return call
    try:
        arguments = json.loads(inner["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    parsed = {**inner, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed
