"""Write a run file for someone's models and texts, with comments, and make sure that it can be run as it is."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fuselm.documents import regrouping, text_files
from fuselm.runs import config
from fuselm.runs.options import schema
from fuselm.runs.options.sources import suggest_source_name
from fuselm.system import atomic_files

SCHEMA = Path(".fuselm") / "run.schema.json"  # beside the run file: what editors complete and check it by
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Hold what a new run is made of. `sources` are models by name; `texts` are files, folders and patterns."""

    target: str
    sources: Mapping[str, str]
    texts: Sequence[str]
    output: str


def name_sources(given: Sequence[str], *, own: str | None = None) -> dict[str, str]:
    """Return models by name. Each is given as NAME=MODEL, or as MODEL, which gets a short name of its own.

    `own` is the target if it should be a source too; it comes first unless it is given.

    Raises:
        ValueError: If a name is given twice.
    """
    named: dict[str, str] = {}
    is_given = own is None or any(own in (spec, spec.partition("=")[2]) for spec in given)
    for spec in given if is_given else [own, *given]:
        name, equals, model = spec.partition("=")
        if equals and not os.path.exists(spec):
            if name in named:
                raise ValueError(f"--source {spec}: the name '{name}' is given twice; take another")
        else:
            model, name = spec, suggest_source_name(spec)
            taken = {*named, *config.RESERVED}
            name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        named[name] = model
    return named


def check_source(given: str) -> None:
    """Raise `ValueError` if a source, NAME=MODEL or MODEL, is neither on this disk nor can be a hub id."""
    for model in name_sources([given]).values():
        check_model(model)


def check_texts(name: str) -> None:
    """Raise `ValueError` if a name of texts stands for no file that can be read."""
    text_files.find_files([name])


def check_model(spec: str) -> None:
    """Raise `ValueError` if a model is neither on this disk nor can be a hub id."""
    path = Path(os.path.expanduser(spec))
    if path.exists():
        return
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(spec):
        raise ValueError(f"{spec}: no such file or folder, and not a hub id such as Qwen/Qwen2.5-0.5B")


def write_run_file(path: Path, choices: Choices) -> list[Path]:
    """Write a run file, the schema that it names, and rows of the texts if they have to be regrouped.

    Nothing that is there is overwritten, except an older schema. Returns the files that were written, the run file
    first.

    Raises:
        ValueError: If there is such a file already, or a model or text cannot be used.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a run file's name ends in .yaml")
    rows_file = path.with_name(f"{path.stem}-texts.jsonl")
    for spec in (choices.target, *choices.sources.values()):
        check_model(spec)
    rows = regrouping.regroup_texts(choices.texts)
    for file in (path, *([rows_file] if rows is not None else [])):
        if file.exists():
            raise ValueError(f"{file}: exists already; nothing is overwritten, so name another file")
    texts = list(choices.texts) if rows is None else [str(rows_file)]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft.yaml")
    try:
        atomic_files.write_text(draft, _compose(choices, texts, path.parent, is_regrouped=rows is not None))
        config.load(draft)
        (path.parent / SCHEMA).parent.mkdir(exist_ok=True)
        atomic_files.write_text(path.parent / SCHEMA, json.dumps(schema.build_run_schema(), indent=1) + "\n")
        if rows is not None:
            atomic_files.write_text(rows_file, regrouping.write_rows(rows))
        os.link(draft, path)  # fails if another process has made it meanwhile
    except ValueError as error:
        raise ValueError(str(error).replace(str(draft), str(path))) from None
    finally:
        draft.unlink(missing_ok=True)
    return [path, *([rows_file] if rows is not None else []), path.parent / SCHEMA]


def _compose(choices: Choices, texts: Sequence[str], folder: Path, *, is_regrouped: bool) -> str:
    """Return the text of the run file in `folder`. Paths in it hold wherever it is run from."""
    sources = "\n".join(f"  {_quote(name)}: {_quote(_place(model, folder))}" for name, model in choices.sources.items())
    files = "\n".join(f"    - {_quote(_place(text, folder))}" for text in texts)
    regrouped = (
        "  # A domain needs three documents or more, so texts with fewer were put together in these rows.\n"
        if is_regrouped
        else ""
    )
    return f"""\
# yaml-language-server: $schema={SCHEMA.as_posix()}
# Made by `fuselm init`. `fuselm plan FILE` estimates this run, `fuselm run FILE` makes it and resumes it after an
# interruption. `fuselm options` lists every option; here are those that a run needs, and some to begin with.

output: {_quote(choices.output)}  # the folder for everything that the run makes

# The model to train: a hub id, a folder or a GGUF file.
target: {_quote(_place(choices.target, folder))}

# The models to learn from, each under a name that tables and pages show. The target may be one of them, so that the
# fusion can keep what it does better already; it costs a reading of the texts.
sources:
{sources}

corpus:
{regrouped}  # Files, folders and patterns: plain text, or rows with `text` and maybe `domain` and `split`.
  files:
{files}
  # heldout: 0.25  # the share of each domain's documents that only the result sees

# train:
#   passes: 4  # over the training documents
#   learning_rate: 1.0e-4
# capture:
#   batch_tokens: 1024  # tokens of one forward pass; raise it on a GPU
"""


def _place(spec: str, folder: Path) -> str:
    """Return a path from the run file's folder, if it is one of this disk and not absolute."""
    path = Path(os.path.expanduser(spec))
    if path.is_absolute() or spec.startswith("~") or not _is_local(path):
        return spec
    return os.path.relpath(path, folder)


def _is_local(path: Path) -> bool:
    return path.exists() or any(mark in str(path) for mark in "*?[") or path.suffix == ".jsonl"


def _quote(text: str) -> str:
    """Return a text as YAML has it in a line."""
    return yaml.safe_dump(text, width=1 << 20, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
