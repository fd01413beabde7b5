"""Find tasks of lm-eval by name, those that come with fuselm among them, before any model is asked.

A task is identified by its settings and its questions, so that answers are found again on any machine, and asked for
anew where either has changed.
"""

import difflib
import functools
import importlib.util
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.system import progress
from fuselm.system.errors import summarize_error
from fuselm.system.fingerprints import hash_lines

if TYPE_CHECKING:
    from lm_eval.api.task import Task

SUITES = Path(__file__).parent / "suites"
FEWSHOT_SEED = 1234  # lm-eval's own seeds, so that its own command asks the same
ROUNDS = 6  # how deep groups of groups are looked for
IDENTIFIED_EXAMPLES = 100  # of a split that examples come from
_WORD = re.compile(r"[\w.+-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTasks:
    """Hold tasks by their own names, what each asked-for name stands for, and a hash of each."""

    tasks: "Mapping[str, Task]"
    members: Mapping[str, tuple[str, ...]]  # names of tasks, by the name that was asked for
    hashes: Mapping[str, str]
    by_size: Mapping[str, bool]  # whether a group's mean counts questions, by the name that was asked for

    def choose(self, name: str) -> "dict[str, Task]":
        """Return the tasks that one name stands for."""
        return {task: self.tasks[task] for task in self.members[name]}


def check_installed() -> None:
    """Raise `ValueError` if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("evaluate.tasks: lm-eval is not installed; run: pip install 'fuselm[tasks]'")


def find_tasks(
    names: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    own: "Mapping[str, Sequence[Mapping[str, Any]]] | None" = None,
) -> FoundTasks:
    """Load tasks with their questions. `own` are settings of further tasks, by the name that stands for them.

    Raises:
        ValueError: If there is no such task, or its questions cannot be had.
    """
    check_installed()
    with progress.announce("reading tasks of lm-eval"):
        return _find_tasks(tuple(names), include_path, limit, num_fewshot, _Frozen(own or {}))


def find_version() -> str:
    """Return the version of lm-eval."""
    return metadata.version("lm_eval")


class _Frozen:
    """Hold a mapping that is the same as another of the same contents, for a cache."""

    def __init__(self, contents: Mapping[str, Sequence[Mapping[str, Any]]]):
        self.contents = contents
        self._text = hash_lines([json.dumps(contents, sort_keys=True, default=str)])

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other._text == self._text


@functools.lru_cache(maxsize=8)
def _find_tasks(
    names: tuple[str, ...], include_path: str | None, limit: int | None, num_fewshot: int | None, own: _Frozen
) -> FoundTasks:
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval takes all cores for an error of a perplexity
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    for logger in ("lm_eval", "datasets", "huggingface_hub", "evaluate"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    _seed()
    paths = _find_folders([name for name in names if name not in own.contents], include_path)
    manager = TaskManager(include_path=[str(path) for path in paths], include_defaults=False)
    tasks: dict[str, Task] = {}
    members, by_size = {}, {}
    for name in names:
        found, by_size[name] = _load(name, manager, own.contents.get(name))
        members[name] = tuple(found)
        tasks |= found
    for name, task in tasks.items():
        _set_examples(name, task, num_fewshot)
    hashes = {name: _identify(task, limit) for name, task in tasks.items()}
    return FoundTasks(tasks=tasks, members=members, hashes=hashes, by_size=by_size)


def _seed() -> None:
    import numpy as np

    random.seed(0)
    np.random.seed(FEWSHOT_SEED)


def _load(name: str, manager, own: Sequence[Mapping[str, Any]] | None) -> "tuple[dict[str, Task], bool]":
    """Return the tasks of a name, and whether its mean counts questions."""
    if own is None and name not in manager.all_tasks and not name.endswith((".yaml", ".yml")):
        raise ValueError(f"evaluate.tasks: lm-eval has no task '{name}'{_suggest(name, manager.all_tasks)}")
    try:
        loaded = manager.load(name if own is None else [dict(settings) for settings in own])
    except Exception as error:  # whatever a task's own code raises
        raise ValueError(f"evaluate.tasks: {name}: {_explain(error)}") from None
    groups = loaded.get("groups") or {}
    settings = getattr(groups.get(name), "aggregate_metric_list", None) or []
    weighs = [s.get("weight_by_size", True) if isinstance(s, dict) else s.weight_by_size for s in settings]
    return dict(loaded["tasks"]), all(weighs)


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}; run: pip install {(error.name or '').replace('_', '-')}"
    if isinstance(error, ConnectionError | OSError) or "Hub" in str(error):
        return (
            f"its questions are not on this disk and cannot be fetched ({summarize_error(error)}); fetch them once "
            "where there is a network, or leave it out"
        )
    return f"cannot be loaded ({summarize_error(error)})"


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean '{close[0]}'?" if close else "; `lm_eval ls tasks` lists them"


def _set_examples(name: str, task: "Task", num_fewshot: int | None) -> None:
    """Set how many examples are shown, as lm-eval's own command does. Raises `ValueError` if a task has too few."""
    fixed = task.get_config("num_fewshot")
    if fixed is None or (num_fewshot is not None and fixed != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if num_fewshot and task.get_config("num_fewshot") == num_fewshot > (count := len(task.fewshot_docs())):
        raise ValueError(f"evaluate.num_fewshot: {name} has {count} examples (got {num_fewshot}); ask for fewer")


def _find_folders(names: Sequence[str], include_path: str | None) -> list[Path]:
    """Return folders that have all these tasks. Reading all of lm-eval's tasks would take a minute."""
    own = [SUITES]
    if include_path is not None:
        if not Path(include_path).expanduser().is_dir():
            raise ValueError(f"evaluate.include_path: {include_path}: no such folder; name one with tasks of lm-eval")
        own.append(Path(include_path).expanduser())
    known = {name for folder in own for name in _list_names(folder)}
    wanted = [name for name in names if name not in known]
    return [*_find_default_folders(wanted), *own] if wanted else own


def _list_names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.yaml")):
        yield from re.findall(r"^\s*-?\s*(?:task|group|tag):\s*([\w.+-]+)\s*$", path.read_text(), re.MULTILINE)


def _find_default_folders(names: Sequence[str]) -> list[Path]:
    """Return the folders of lm-eval's own files that mention these names, or names that those files mention."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    words = {path: set(_WORD.findall(path.read_text(errors="ignore"))) for path in sorted(root.rglob("*.y*ml"))}
    defined: dict[str, list[Path]] = {}
    for path in words:
        for name in _read_defined(path):
            defined.setdefault(name, []).append(path)
    folders: dict[Path, None] = {}
    waiting, seen = list(names), set(names)
    for _ in range(ROUNDS):
        paths = [path for name in waiting for path in defined.get(name, [])]
        folders |= {path.parent: None for path in paths}
        waiting = [w for path in paths for w in words[path] if w in defined and w not in seen]
        seen |= set(waiting)
    return list(folders)


def _read_defined(path: Path) -> list[str]:
    """Return the names of tasks, groups and tags that a file of lm-eval defines or belongs to."""
    text = path.read_text(errors="ignore")
    found = re.findall(r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?$", text, re.MULTILINE)
    for block in re.findall(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*[^\n]+\n?)+)", text, re.MULTILINE):
        found += re.findall(r"-[ \t]*[\"']?([\w.+-]+)", block)
    return found


def _identify(task: "Task", limit: int | None) -> str:
    """Return a hash of a task's settings and of its questions, the first `limit` of them."""
    settings = {k: v for k, v in task.dump_config().items() if k not in ("dataset_kwargs", "custom_dataset")}
    settings["metadata"] = {k: v for k, v in (settings.get("metadata") or {}).items() if k != "config_source"}
    lines = [re.sub(r" at 0x[0-9a-f]+", "", json.dumps(settings, sort_keys=True, default=_describe))]
    for docs, count in ((task.eval_docs, limit), (_list_examples(task), IDENTIFIED_EXAMPLES)):
        for number, doc in enumerate(docs):
            if count is not None and number >= count:
                break
            lines.append(json.dumps(doc, sort_keys=True, default=_describe, ensure_ascii=False))
    return hash_lines(lines)


def _list_examples(task: "Task") -> Iterable[Any]:
    if not task.get_config("num_fewshot"):
        return ()
    return (task.fewshot_docs() if task.has_training_docs() or task.has_validation_docs() else None) or ()


def _describe(value: Any) -> str:
    """Describe what JSON cannot hold, without an address in memory."""
    if isinstance(value, Callable):
        return getattr(value, "__qualname__", type(value).__name__)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
