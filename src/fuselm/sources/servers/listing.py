"""Read what a server's list of models says about the one that is wanted."""

from typing import Any

from fuselm.sources.servers.answers import describe, require_type
from fuselm.system.server_keys import LONG_KEY

IDENTITY_FIELDS = ("id", "root", "parent")  # entries about a model that survive a restart of the server
NAMES = 10  # that are shown of those that a server has
LEAST_CONTEXT, MOST_CONTEXT = 16, 1 << 31  # tokens


def find_model(answer: Any, served: str, key: str) -> dict[str, Any]:
    """Return the identity of the model `served`, and `max_model_len` if the list has it.

    Raises `ValueError` if it isn't there or the list can't be one. Nothing that holds the `key` is returned, because
    what is returned is written to disk.
    """
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise ValueError("its list of models can't be read; is this a completions server?")
    names = [require_type(entry, dict, "an entry of its list of models").get("id") for entry in entries]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"the id of a model in its list is {describe(name)}, not a string")
    found = [_check_entry(entry) for name, entry in zip(names, entries, strict=True) if name == served]
    if not found:
        there = ", ".join(map(describe, names[:NAMES])) or "none"
        more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
        raise ValueError(f"serves no model {describe(served)}, but {there}{more}; name one of them")
    if any(entry != found[0] for entry in found):
        raise ValueError(f"lists {describe(served)} several times, as different models; give each a name of its own")
    if len(key) >= LONG_KEY and any(key in value for value in found[0].values() if isinstance(value, str)):
        raise ValueError("its list of models holds the key that it was sent; ask whoever runs it to stop that")
    return found[0]


def check_known(entry: Any, served: str) -> dict[str, Any] | None:
    """Return what was written down of a model, or None if no server could have said it."""
    try:
        return find_model({"data": [entry]}, served, "")
    except ValueError:
        return None


def _check_entry(entry: dict[str, Any]) -> dict[str, Any]:
    for name in IDENTITY_FIELDS:
        if not isinstance(entry.get(name), str | None):
            raise ValueError(f"`{name}` of a model in its list is {describe(entry[name])}, not a string")
    context = entry.get("max_model_len")
    if context is not None and (type(context) is not int or not LEAST_CONTEXT <= context <= MOST_CONTEXT):
        raise ValueError(f"`max_model_len` of a model in its list is {describe(context)}, not a number of tokens")
    return {name: entry[name] for name in (*IDENTITY_FIELDS, "max_model_len") if entry.get(name)}
