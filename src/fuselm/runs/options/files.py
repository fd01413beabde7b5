"""Read files of options: YAML in which nothing is given twice, overrides, and one line for what is wrong."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Options(BaseModel):
    """Hold some options of a file: checked, never changed, and none that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read(path: Path, command: str, needs: str) -> dict[str, Any]:
    """Read a `command`'s file, which `needs` some options. Raise `ValueError` in one line if it is no such file."""
    try:
        options = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"{path}: not a {command} file; `fuselm {command}` takes a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or 'cannot be parsed'})") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: not a {command} file; it needs {needs}")
    return options


def expand_home(path: str, name: str) -> str:
    """Return a path with `~` as the home folder it stands for. Raises `ValueError` if there is no such user."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{name}: no home folder is known for {path.split('/')[0]} (got {path}); write the whole path")
    return expanded


class _Loader(yaml.SafeLoader):
    """YAML in which no option is given twice; PyYAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' is given twice; drop one", problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


def override(options: dict[str, Any], given: str) -> None:
    """Put `option.name=value` into the options."""
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise ValueError(f"{given}: not an override; write option.name=value")
    *parents, last = name.split(".")
    for parent in parents:
        if not isinstance(options.get(parent), dict):
            options[parent] = {"model": options[parent]} if isinstance(options.get(parent), str) else {}
        options = options[parent]
    try:
        options[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"{given}: the value is not YAML") from None


def first_problem(
    error: ValidationError,
    command: str,
    known: Callable[[list[str]], list[str]],
    shown: Callable[[list[str]], list[str]] = lambda location: location,
) -> str:
    """Return the first thing that is wrong, in one line.

    `known` returns the names that could have been at a place, and `shown` the place as the file has it.
    """
    problems = error.errors()
    of_value = next((p for p in problems if not p["type"].endswith("_type")), problems[0])  # not of its type
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), of_value)
    location = [str(part) for part in problem["loc"] if not str(part).endswith(("constrained-float", "]"))]
    name = ".".join(shown(location))
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown option; {meant(location[-1], known(location))}"
    if problem["type"] == "missing":
        return f"{name}: missing; every {command} needs it"
    if problem["type"] == "value_error":
        return ": ".join([*([name] if name.endswith(".server") else []), str(problem["ctx"]["error"])])
    return f"{name}: {problem['msg'][:1].lower()}{problem['msg'][1:]} (got {problem['input']!r})"


def meant(name: str, known: list[str]) -> str:
    """Return a hint at what may have been meant by a name that isn't there."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
