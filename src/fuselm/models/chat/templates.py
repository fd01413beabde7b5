"""Find a model's chat template, the names that it may use, and the tokens that end what the model generates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselm.models.checkpoints import read_json
from fuselm.models.locating import Model

PLAIN = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\\n\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant:\\n' + message.content + eos_token + '\\n\\n' }}
    {%- else %}
        {{- message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""
NAMED = {"plain": PLAIN}  # templates for models without one
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Hold a chat template, and the one for conversations with `tools` if the model has another for them.

    `names` are special tokens, by the names under which a template writes them. `is_own` tells whether the template
    came with the model.
    """

    text: str
    with_tools: str | None
    names: Mapping[str, str]
    is_own: bool


def find_template(folder: Path, instead: str | None = None) -> Template:
    """Return the chat template of a model's folder; `instead` is for a model without one: a name, or a template's text.

    Raises `ValueError` if there is none, or a file is damaged.
    """
    settings = _read_settings(folder)
    own = _list_own_templates(folder, settings)
    if own:
        first = own.get("default") or next(iter(own.values()))
        return Template(text=first, with_tools=own.get("tool_use"), names=_read_names(folder, settings), is_own=True)
    if instead is None:
        raise ValueError(
            f"{folder}: has no chat template, so it reads no conversations; set chat.template "
            f"({', '.join(NAMED)}, or target for the target's), or take a model that was trained on conversations"
        )
    if instead not in NAMED and "{" not in instead:
        raise ValueError(f"chat.template {instead!r}: unknown; needs one of {', '.join(NAMED)}, or a template's text")
    return Template(
        text=NAMED.get(instead, instead), with_tools=None, names=_read_names(folder, settings), is_own=False
    )


def read_template(given: str | None, target: Model, *, option: str = "chat.template") -> str | None:
    """Return the template that `option` gives: by its name, as the target's, as a file, or as it is.

    Raises `ValueError` if there is no such template.
    """
    if given is None or given in NAMED or "{" in given:
        return given
    if given == "target":
        try:
            return find_template(target.folder).text
        except ValueError:
            raise ValueError(f"{option}: target, but {target.name} has no template; take another") from None
    path = Path(given)
    if not path.is_file():
        known = ", ".join((*NAMED, "target"))
        raise ValueError(f"{option}: no file {given}; name one, take one of {known}, or give the template's text")
    return path.read_text(encoding="utf-8")


def has_template(model: Model) -> bool:
    """Tell whether a model has a chat template of its own."""
    try:
        return find_template(model.folder).is_own
    except ValueError:
        return False


def read_end_tokens(folder: Path, names: Mapping[str, str]) -> list[int | str]:
    """Return the tokens that end what the model generates, as its files name them: ids or strings."""
    found: list[int | str] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return [*found, *([names["eos_token"]] if "eos_token" in names else [])]


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _list_own_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return templates by name; a file of its own comes before the settings, as in transformers."""
    value = settings.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        found |= {str(item.get("name")): str(item.get("template")) for item in value if isinstance(item, Mapping)}
    elif isinstance(value, Mapping):
        found |= {str(name): str(text) for name, text in value.items()}
    elif value is not None:
        raise ValueError(
            f"{folder}/tokenizer_config.json: chat_template is a {type(value).__name__}, needs a string; correct it"
        )
    if (path := folder / "chat_template.json").is_file():
        text = read_json(path).get("chat_template")
        found |= {"default": text} if isinstance(text, str) else {}
    for path in [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
        if path.is_file():
            name = "default" if path.parent == folder else path.stem
            try:
                found[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{path}: not UTF-8; download the model again") from None
    return {name: text for name, text in found.items() if text.strip()}


def _read_names(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    path = folder / "special_tokens_map.json"
    files = [read_json(path)] if path.is_file() else []
    names: dict[str, str] = {}
    for file in [*files, settings]:
        extra = file.get("extra_special_tokens")
        entries = {**{key: file[key] for key in _TOKENS if key in file}, **(extra if isinstance(extra, dict) else {})}
        for key, value in entries.items():
            token = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(token, str) and token:
                names[key] = token
            else:
                names.pop(key, None)
    return names
