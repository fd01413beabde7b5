"""Read files of options: YAML in which nothing is given twice, and overrides from the command line."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fuselm.system.remote_paths import EXCLUSIVE, RemotePath, is_remote, open_path

Overrides = str | Sequence[str] | Mapping[str, Any]  # `section.option=value`, one or several; or values by name

KINDS: dict[str, Callable[[Mapping[str, Any]], bool]] = {  # commands, and how their files are told apart
    "run": lambda options: "target" in options and "sources" in options,
    "study": lambda options: "run" in options and ("experiments" in options or "arms" in options),
    "merge": lambda options: "merge_method" in options or {"method", "models"} <= set(options),
}


def read_options(path: Path, command: str, needs: str) -> dict[str, Any]:
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


def refuse_other_kind(path: Path, command: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the options in a file are clearly those of another command's file."""
    other = next((kind for kind, is_one in KINDS.items() if is_one(options)), command)
    if other != command and not KINDS[command](options):
        raise ValueError(f"{path}: this is a {other} file; take `fuselm {other}`, or name a {command} file")


def expand_home(path: str, name: str) -> str:
    """Return a path with `~` as the home folder it stands for; a remote one is checked.

    Raises `ValueError` if there is no such user, or the remote path cannot be used.
    """
    if is_remote(path):
        return str(_check_shared(open_path(path), name))
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{name}: no home folder is known for {path.split('/')[0]} (got {path}); write the whole path")
    return expanded


def _check_shared(path: Path, name: str) -> Path:
    """Return a remote path that processes can write to together. Raises `ValueError` for others."""
    if isinstance(path, RemotePath) and path.protocol not in EXCLUSIVE:
        raise ValueError(
            f"{name}: {path} can be read, and is no place that a run can write to; take s3://, gs:// or az://"
        )
    return path


class _Loader(yaml.SafeLoader):
    """Load YAML in which no option is given twice; PyYAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value == "on":  # an option's name, which YAML 1.1 takes for `true`
                key.tag = "tag:yaml.org,2002:str"
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' is given twice; drop one", problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


def override_options(options: dict[str, Any], overrides: Overrides) -> None:
    """Put overrides into the options, in their order."""
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            put_option(options, name, value)
        return
    for given in [overrides] if isinstance(overrides, str) else overrides:
        override_option(options, given)


def override_option(options: dict[str, Any], given: str) -> None:
    """Put `option.name=value` into the options."""
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise ValueError(f"{given}: not an override; write option.name=value")
    try:
        put_option(options, name, yaml.safe_load(value))
    except yaml.YAMLError:
        raise ValueError(f"{given}: the value is not YAML") from None


def put_option(options: dict[str, Any], name: str, value: Any) -> None:
    """Put the value of an option, named as `section.option`, into the options."""
    *parents, last = name.split(".")
    for parent in parents:
        if not isinstance(options.get(parent), dict):
            options[parent] = {"model": options[parent]} if isinstance(options.get(parent), str) else {}
        options = options[parent]
    options[last] = value
