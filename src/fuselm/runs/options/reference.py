"""Write the reference of options: what each may be, its default and what it does, as plain text or Markdown.

All of it comes from the fields that define the options.
"""

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from fuselm.runs.config import RunOptions
from fuselm.runs.options.outline import NAME, Section, list_sections
from fuselm.runs.options.problems import suggest_option
from fuselm.runs.options.study import StudyOptions

STUDY = "study"  # what names of a study file's options begin with
WIDTH = 100
INTRODUCTION = """
# Options

<!-- Made by `fuselm options --markdown > docs/options.md`, from src/fuselm/runs/options. -->

This page has every option of a run file, then every option of a study file. A file is YAML; on the
command line, `train.passes=2` overrides an option. NAME stands for a name that you give.
`fuselm options train` prints a section or an option, and `fuselm schema` the JSON schema by which
editors complete and check a file.
"""
BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
}
HEADINGS = {
    "": ("Run files", "A run needs `output`, `target`, `sources` and `corpus`."),
    STUDY: ("Study files", "A study needs `run`, `output` and `experiments`; an option's name begins after `study.`."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Describe one option: its whole name, what it may be and its default, what it does, and what its choices do."""

    name: str
    values: str
    description: str
    choices: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Hold the options of one section, and what the section is for."""

    name: str
    kind: str
    paragraphs: Sequence[str]
    options: Sequence[Option]


def list_groups() -> list[Group]:
    """Return all options of run files and study files, by section, in the order of their definition."""
    groups = [_read_group(section) for section in list_sections(RunOptions)]
    return groups + [_read_group(section) for section in list_sections(StudyOptions, STUDY)]


def select_groups(name: str | None) -> list[Group]:
    """Return the section `name` with all within it, or the options of that name; all options for None.

    Raises:
        ValueError: If there is no such option; the message says what may have been meant.
    """
    groups = list_groups()
    if name is None:
        return groups
    if inside := [g for g in groups if _matches(g.name, name) or _matches(g.name.removesuffix(f".{NAME}"), name)]:
        names = {g.name for g in inside}
        return [g for g in groups if any(g.name == n or g.name.startswith(f"{n}.") for n in names)]
    found = [_keep_options(g, name, whole=True) for g in groups]
    if not any(g.options for g in found) and "." not in name:
        found = [_keep_options(g, name, whole=False) for g in groups]
    if not any(g.options for g in found):
        is_study = name.startswith(f"{STUDY}.")
        hint = suggest_option(name.removeprefix(f"{STUDY}.").split("."), StudyOptions if is_study else RunOptions)
        place = name.removeprefix(f"{STUDY}.").rpartition(".")[0]
        if place and "." not in hint:
            hint = hint.replace("did you mean '", f"did you mean '{place}.")
        raise ValueError(f"{name}: no such option; {hint}")
    return [g for g in found if g.options]


def write_text(groups: Sequence[Group]) -> str:
    """Return options as plain text for a terminal."""
    lines: list[str] = []
    for group in groups:
        heading = f"{group.name or HEADINGS[''][0]}{f' (a {group.kind})' if group.kind else ''}"
        intro = textwrap.wrap(" ".join([f"{heading}:", *group.paragraphs]), WIDTH)
        lines += [*intro, ""]
        for option in group.options:
            lines += [f"  {option.name}", f"      {option.values}"]
            lines += textwrap.wrap(option.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
            for choice, does in option.choices.items():
                lines += textwrap.wrap(f"{choice}: {does}", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10)
            lines.append("")
    return "\n".join(lines).rstrip()


def write_markdown() -> str:
    """Return the page of all options."""
    blocks = [INTRODUCTION.strip()]
    for group in list_groups():
        if group.name in HEADINGS:
            title, says = HEADINGS[group.name]
            blocks += [f"## {title}", _wrap(says)]
        else:
            blocks += [f"### `{group.name}`{f', a {group.kind}' if group.kind else ''}", *map(_wrap, group.paragraphs)]
        for option in group.options:
            kind = f", a {group.kind}" if group.kind else ""
            blocks += [f"#### `{option.name}`{kind}", _wrap(f"*{option.values}.* {option.description}")]
            choices = [_wrap(f"- `{choice}`: {does}", indent="  ") for choice, does in option.choices.items()]
            blocks += ["\n".join(choices)] if choices else []
    return "\n\n".join(blocks) + "\n"


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _matches(pattern: str, name: str) -> bool:
    """Tell whether a name is that of the pattern, in which NAME stands for any name."""
    parts, given = pattern.split("."), name.split(".")
    return len(parts) == len(given) and all(p in (NAME, g) for p, g in zip(parts, given, strict=True))


def _keep_options(group: Group, name: str, *, whole: bool) -> Group:
    kept = [o for o in group.options if (_matches(o.name, name) if whole else o.name.rpartition(".")[2] == name)]
    return Group(name=group.name, kind=group.kind, paragraphs=group.paragraphs, options=kept)


def _read_group(section: Section) -> Group:
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(section.options.__doc__ or "").split("\n\n")]
    return Group(
        name=section.name,
        kind=section.kind,
        paragraphs=paragraphs if section.name not in HEADINGS else [HEADINGS[section.name][1]],
        options=list(_read_options(section)),
    )


def _read_options(section: Section) -> Iterator[Option]:
    """Yield the options of a section that hold a value, not those that are sections themselves."""
    schema = section.options.model_json_schema(by_alias=True)
    for name, field in section.options.model_fields.items():
        shown = field.alias or name
        given = schema["properties"][shown]
        if "$ref" in str(given):
            continue
        yield Option(
            name=f"{section.name}.{shown}".lstrip("."),
            values=_describe_values(given, field.default),
            description=field.description or "",
            choices=_find_choices(given),
        )


def _describe_values(schema: Mapping[str, Any], default: Any) -> str:
    """Return what an option may be and its default, in a line."""
    if default is None:
        parts = [part for part in schema["anyOf"] if part != {"type": "null"}]
        return f"{_describe_schema({'anyOf': parts})}; optional"
    said = "required" if default is PydanticUndefined else f"default {_write_yaml(default)}"
    return f"{_describe_schema(schema)}; {said}"


def _write_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _find_choices(schema: Mapping[str, Any]) -> dict[str, str]:
    parts = [schema, *schema.get("anyOf", []), schema.get("items", {})]
    described = next((part for part in parts if "enumDescriptions" in part), None)
    return dict(zip(described["enum"], described["enumDescriptions"], strict=True)) if described else {}


def _describe_schema(schema: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_describe_schema(part) for part in schema["anyOf"])
    if "const" in schema:
        return f"`{_write_yaml(schema['const'])}`"
    if "enum" in schema:
        return "one of the names below"
    kind = schema.get("type", "any value")
    if kind == "array":
        return f"list of {_describe_items(schema.get('items', {}))}"
    if kind == "object":
        values = schema.get("additionalProperties", True)
        return (
            f"mapping of names to {_describe_schema(values)}"
            if isinstance(values, dict)
            else "mapping of options to values"
        )
    names = {"string": "text", "boolean": "true or false", "integer": "whole number"}
    return f"{names.get(kind, kind)}{_describe_range(schema)}"


def _describe_items(schema: Mapping[str, Any]) -> str:
    return {"text": "texts", "number above 0": "numbers above 0"}.get(said := _describe_schema(schema), said)


def _describe_range(schema: Mapping[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    said = [f"{words} {schema[bound]:.10g}" for bound, words in BOUNDS.items() if bound in schema]
    return f" {' and '.join(said)}" if said else ""
