"""Name models, texts and options in what is published, without saying where they are on this machine.

Published are summary.json, report.html, the model's folder, a study's files, pages, and stores with their manifests.
config.yaml, run.json and steps.json in a run's folder, and .runs.json in the folder of shared stores, are for this
machine, and hold its paths.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MODELS = re.compile(r"(.*\.)?(model|tokenizer|target)|sources\.[^.]*")  # options that may be hub ids
_EXACT = re.compile(r"(.*\.)?revision")  # a branch may have slashes in its name


def name_publicly(model: str) -> str:
    """Return a hub id as it is, and the last part of the path of a model."""
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else _name_place(model)


def is_hub_name(public_name: str) -> bool:
    """Tell whether what `name_publicly` returned is a hub id, which others can look up."""
    return bool(_HUB_ID.fullmatch(public_name))


def name_options_publicly(options: Any, name: str = "") -> Any:
    """Return the options of a run, in sections or by their dotted names, with no paths and no addresses in them."""
    if isinstance(options, Mapping):
        return {key: name_options_publicly(value, f"{name}.{key}".lstrip(".")) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [name_options_publicly(value, name) for value in options]
    if not isinstance(options, str) or _EXACT.fullmatch(name):
        return options
    return name_publicly(options) if _MODELS.fullmatch(name) else _name_place(options)


def _name_place(text: str) -> str:
    """Return text as it is unless it is a path or an address."""
    if found := _ADDRESS.match(text):
        return "a server" if found[1].lower() in ("http", "https") else _last_part(text)
    is_path = re.search(r"[/\\]", text) or text.startswith("~") or text in (".", "..")
    return _last_part(text) if is_path else text


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else Path(path).expanduser().resolve().name
