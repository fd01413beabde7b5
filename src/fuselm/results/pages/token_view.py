"""Prepare the token view of a run's page: what it holds as JSON, and what it says about its choice of documents."""

from collections.abc import Mapping
from typing import Any

from fuselm.results.token_rows import MOST_TOKENS
from fuselm.system.foreign_text import write_json


def prepare_token_view(rows: Mapping[str, Any], styles: Mapping[str, str]) -> dict[str, str]:
    """Return the view's `json`, which is safe within a `script` element, and the sentence that `says` what is chosen.

    `rows` are those of `token_rows.gather_token_rows`; `styles` name the style of each source and model.
    """
    shown = {**rows, "styles": {name: styles.get(name, "fused") for name in rows["names"]}}
    return {"json": _escape_for_script(write_json(shown)), "says": describe_choice(rows)}


def describe_choice(rows: Mapping[str, Any]) -> str:
    """Say which documents are shown, of how many, and how much of each."""
    words = {"heldout": "held-out", "train": "training"}
    parts = []
    for split, count in rows["splits"].items():
        chosen = sum(document["split"] == split for document in rows["documents"])
        parts.append(f"{chosen} of the {count:,} {words[split]} document{'s' if count != 1 else ''}")
    return (
        f"Shown are {' and '.join(parts)}, evenly spaced within each domain, and at most the first {MOST_TOKENS} "
        "tokens of each."
    )


def _escape_for_script(text: str) -> str:
    """Replace what could end a `script` element or begin a comment by JSON's own escapes."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("://", ":\\u002f/")
