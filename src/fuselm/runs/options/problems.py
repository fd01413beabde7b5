"""Say in one line what is wrong with a file of options, and what was probably meant."""

import difflib
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ValidationError

from fuselm.runs.options.other_names import OTHER_NAMES
from fuselm.runs.options.outline import NAME, Section, list_sections

CLOSE, VAGUE = 0.8, 0.5  # how like another name one is, by difflib's ratio
NEEDED = {  # what pydantic's types of errors say that a value should have been
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "options, as name: value"),
    "list_type": "a list",
    "string_type": "a text",
}
SHORTEST_BEGINNING = 3  # letters of a name's beginning that suggest it


def describe_first_problem(
    error: ValidationError,
    command: str,
    options: type[BaseModel],
    *,
    shorten: Callable[[list[str]], list[str]] = lambda location: location,
) -> str:
    """Return the first thing that is wrong with a `command`'s file, in one line.

    `shorten` turns the place that pydantic names into the place as the file has it.
    """
    found = error.errors()
    not_of_type = next((p for p in found if not p["type"].endswith("_type")), found[0])
    problem = next((p for p in found if p["type"] == "extra_forbidden"), not_of_type)
    location = [str(part) for part in problem["loc"] if not str(part).endswith(("constrained-float", "]"))]
    name = ".".join(shorten(location))
    if problem["type"] == "extra_forbidden":
        kind = location[2] if location[0] == "sources" and len(location) > 3 else ""
        return f"{name}: unknown option; {suggest_option(shorten(location), options, kind)}"
    if problem["type"] == "missing":
        return f"{name}: missing; every {command} needs it"
    if (needed := NEEDED.get(problem["type"])) is not None:
        return f"{name}: needs {needed} (got {problem['input']!r})"
    if problem["type"] == "value_error":
        return ": ".join([*([name] if name.endswith(".server") else []), str(problem["ctx"]["error"])])
    return f"{name}: {problem['msg'][:1].lower()}{problem['msg'][1:]} (got {problem['input']!r})"


def suggest_option(location: Sequence[str], options: type[BaseModel], kind: str = "") -> str:
    """Return a hint at what may have been meant by an option that a file of `options` does not have.

    It may have another name in other tools, be mistyped, or belong into another section.
    """
    *place, name = location
    sections = list_sections(options)
    here = next((s for s in sections if s.is_at(place) and kind in ("", s.kind)), sections[0])
    is_of_a_model = here.name == "target" or NAME in here.name
    meant = [path for path in OTHER_NAMES.get(name, ()) if _has_option(sections, path)]
    for path in meant:
        if path.rpartition(".")[0] == here.name:
            return f"did you mean '{path.rpartition('.')[2]}'?"
    if meant and not is_of_a_model:
        return f"did you mean '{meant[0]}'?"
    known = here.list_names()
    if close := difflib.get_close_matches(name, known, n=1, cutoff=CLOSE):
        return f"did you mean '{close[0]}'?"
    if not is_of_a_model and (elsewhere := _find_elsewhere(sections, name)):
        return f"did you mean '{elsewhere[0]}'?"
    if len(name) >= SHORTEST_BEGINNING and (begun := [option for option in known if option.startswith(name)]):
        return f"did you mean '{begun[0]}'?"
    return suggest_name(name, known)


def suggest_name(name: str, known: Sequence[str]) -> str:
    """Return a hint at what may have been meant by a name that isn't there."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=VAGUE)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _has_option(sections: Sequence[Section], path: str) -> bool:
    section, _, name = path.rpartition(".")
    return any(s.name == section and name in s.list_names() for s in sections)


def _find_elsewhere(sections: Sequence[Section], name: str) -> list[str]:
    """Return the options of that name in sections that are there once."""
    single = (s for s in sections if s.name and NAME not in s.name and s.name != "target")
    return [f"{section.name}.{name}" for section in single if name in section.list_names()]
