"""Make the JSON schema of run files and study files, by which editors complete and check them."""

from typing import Any

from fuselm.runs.config import RunOptions
from fuselm.runs.options.outline import Section, list_sections
from fuselm.runs.options.study import SECTIONS, StudyOptions

DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that yaml-language-server knows in full

# Options that end in names that the user gives: sources.qwen, fuse.weights.qwen.python.
OPEN_NAMES = (
    r"^(sources|target|write\.ratio|fuse\.weights|fuse\.temperatures|merge\.parameters|merge\.models|merge\.base)(\.|$)"
)


def build_run_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file."""
    return _finish(RunOptions.model_json_schema(by_alias=True), "fuselm run file")


def build_study_schema() -> dict[str, Any]:
    """Return the JSON schema of a study file. It knows the options of the run that `set` and `try` may change."""
    schema = StudyOptions.model_json_schema(by_alias=True)
    definitions = schema["$defs"] | RunOptions.model_json_schema(by_alias=True)["$defs"]
    changes = _list_changes()
    trials = {name: {"type": "array", "minItems": 1, "items": values} for name, values in changes.items()}
    definitions["Changes"] = _allow(changes | _list_partial_sections(), OPEN_NAMES)
    definitions["Trials"] = _allow(trials, OPEN_NAMES, {"type": "array", "minItems": 1})
    for properties in (schema["properties"], definitions["ArmOptions"]["properties"]):
        properties["set"] = _refer("Changes", properties["set"])
    properties["try"] = _refer("Trials", properties["try"])
    return _finish({**schema, "$defs": definitions}, "fuselm study file")


def _list_changes() -> dict[str, Any]:
    """Return the schema of each option of a run that a study may change, by its whole name."""
    sections = [s for s in list_sections(RunOptions) if s.name.partition(".")[0] in SECTIONS]
    return {f"{s.name}.{option}": _locate(s, option) for s in sections for option in s.list_names()}


def _list_partial_sections() -> dict[str, Any]:
    """Return the schema of each section of a run of which a study may change a part."""
    sections = [s for s in list_sections(RunOptions) if s.name in SECTIONS]
    return {s.name: _allow({option: _locate(s, option) for option in s.list_names()}, r"\.") for s in sections}


def _locate(section: Section, option: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{section.options.__name__}/properties/{option}"}


def _allow(properties: dict[str, Any], pattern: str, value: Any = True) -> dict[str, Any]:
    """Return the schema of a mapping with these properties, and others whose names match the pattern."""
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {pattern: value},
        "additionalProperties": False,
    }


def _refer(definition: str, described: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": [{"$ref": f"#/$defs/{definition}"}], "description": described["description"]}


def _finish(schema: dict[str, Any], title: str) -> dict[str, Any]:
    """Name the draft and the title, and drop the titles that repeat the names of options."""
    return {"$schema": DRAFT, "title": title} | _drop_titles(schema)


def _drop_titles(schema: Any) -> Any:
    if isinstance(schema, dict):
        kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
        return {key: _drop_titles(value) for key, value in kept.items()}
    return [_drop_titles(part) for part in schema] if isinstance(schema, list) else schema
