"""Show tokens as text that a person can read."""

from fuselm.models.chat.messages import END_OF_TURN
from fuselm.system.foreign_text import escape_controls


def show_token(token: bytes | None) -> str:
    """Return a token's text, with white space made visible and bytes that are no text as escapes.

    None, a special token without bytes, is shown as `(special)`, and the end of a conversation's turn as `(end)`.
    """
    if token == END_OF_TURN:
        return "(end)"
    if token is None:
        return "(special)"
    text = escape_controls(token.decode("utf-8", "backslashreplace")).replace(" ", "·")
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )  # escapes other white space
