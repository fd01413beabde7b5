"""Make text that others wrote (documents, tokens, names, paths, servers' answers) safe to show.

Such text may hold terminal escapes, characters that change the direction of writing, markup or half a character. None
of it takes effect and nothing is lost: a character that cannot be shown appears as an escape such as `\\x1b`.
"""

import html
import json
import re
import unicodedata
from typing import Any

# Controls (C0 and C1), formats (direction, tags, byte order mark), halves of surrogate pairs, line and paragraph ends.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # formats that Persian, Hindi and emoji are spelled with

# What begins anything in Markdown, wherever it stands. An underscore within a word begins nothing.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
# What begins a block where a line begins: a heading or what underlines one, a list, a rule, code.
_MARKDOWN_AT_START = re.compile(r"^ *(?:#(?=#{0,5}(?: |$))|[+-](?= |$)|[-=](?=[-= ]*$)|\d(?=\d*[.)](?: |$)))|^ ")
_AUTOMATIC_LINK = re.compile(r"(?<=\w)(:)(?=//)|(?<=\bwww)(\.)|(?<=\w)(@)(?=\w)")


def escape_controls(text: str, *, keep: str = "") -> str:
    """Replace every character that acts instead of being seen by an escape, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or _is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def put_on_one_line(text: str) -> str:
    """Join the lines of a message with spaces, and escape what acts instead of being seen."""
    return escape_controls(re.sub(r"[ \t\r\n]+", " ", text).strip(" "))


def escape_html(text: str) -> str:
    """Escape text for HTML, SVG and XML, within elements and within quoted attributes."""
    return html.escape(escape_controls(text))


def escape_markdown(text: str) -> str:
    """Escape text for a line of Markdown, of a table too, so that a reader sees the characters themselves."""
    text = html.escape(escape_controls(text), quote=False)
    text = _MARKDOWN.sub(r"\\\g<0>", text)
    text = _MARKDOWN_AT_START.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text)
    return _AUTOMATIC_LINK.sub(lambda found: f"&#{ord(found[0])};", text)


def escape_prose(text: str) -> str:
    """Escape HTML and what acts in Markdown that somebody meant as Markdown; its code is as it is."""
    text = escape_controls(text, keep="\n")
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)|<", lambda found: found[0] if found[1] else "&lt;", text, flags=re.DOTALL)


def write_code(text: str) -> str:
    """Return a Markdown code span that shows text of any content, outside of tables."""
    text = escape_controls(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def write_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON with characters as they are, except those that act: these are JSON's own escapes, so data is exact.

    Raises `ValueError` for numbers that JSON does not have.
    """
    written = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    if written.isprintable():
        return written
    return "".join(c if c == "\n" or _is_visible(c) else json.dumps(c)[1:-1] for c in written)


def _is_visible(character: str) -> bool:
    if unicodedata.category(character) in _ESCAPED:
        return character in _JOINERS
    code = ord(character)
    return not (code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF)  # no characters, and forbidden in XML
