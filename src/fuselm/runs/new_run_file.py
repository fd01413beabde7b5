"""Write a run file for someone's models and texts, with comments, and make sure that it can be run as it is."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fuselm.documents import text_files
from fuselm.models import checkpoints, fused_models
from fuselm.runs import config
from fuselm.runs.new_run_texts import PreparedTexts, prepare_texts
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
    columns: Mapping[str, str] = field(default_factory=dict)


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
    """Raise `ValueError` if a model is neither on this disk, whole, nor can be a hub id."""
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        folder = fused_models.find_model_folder(spec, path)
        checkpoints.list_weight_files(folder, checkpoints.read_config(folder))
    elif path.is_file() and path.suffix.lower() != ".gguf":
        raise ValueError(f"{spec}: not a model; needs a hub id, a folder with a model, or a GGUF file")
    elif not path.exists() and (path.suffix == ".gguf" or not HUB_ID.fullmatch(spec)):
        raise ValueError(f"{spec}: no such file or folder, and not a hub id such as Qwen/Qwen2.5-0.5B")


def write_run_file(path: Path, choices: Choices) -> tuple[list[Path], list[str]]:
    """Write a run file, the schema that it names, and rows of the texts if they have to be regrouped.

    Nothing that is there is overwritten, except an older schema. Returns the files that were written, the run file
    first, and what the user should know of the texts, a line each.

    Raises:
        ValueError: If there is such a file already, or a model or text cannot be used.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a run file's name ends in .yaml")
    for spec in (choices.target, *choices.sources.values()):
        check_model(spec)
    if set(choices.sources.values()) == {choices.target}:
        raise ValueError("--source: the target is the only one, so there is nothing to learn from; add another model")
    texts = prepare_texts(choices.texts, choices.columns, path.with_name(f"{path.stem}-texts.jsonl"))
    made = [path, *([texts.rows_file] if texts.rows_file is not None else [])]
    for file in made:
        if file.exists():
            raise ValueError(f"{file}: exists already; nothing is overwritten, so name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft.yaml")
    try:
        atomic_files.write_text(draft, _compose(choices, texts, path.parent))
        config.load(draft)
        (path.parent / SCHEMA).parent.mkdir(exist_ok=True)
        atomic_files.write_text(path.parent / SCHEMA, json.dumps(schema.build_run_schema(), indent=1) + "\n")
        if texts.rows_file is not None:
            atomic_files.write_text(texts.rows_file, texts.rows)
        os.link(draft, path)  # fails if another process has made it meanwhile
    except ValueError as error:
        raise ValueError(str(error).replace(str(draft), str(path))) from None
    finally:
        draft.unlink(missing_ok=True)
    return [*made, path.parent / SCHEMA], texts.notes


def _compose(choices: Choices, texts: PreparedTexts, folder: Path) -> str:
    """Return the text of the run file in `folder`. Paths in it hold wherever it is run from."""
    sources = "\n".join(f"  {_quote(name)}: {_quote(_place(model, folder))}" for name, model in choices.sources.items())
    files = "\n".join(f"    - {_quote(_place(name, folder))}" for name in texts.names)
    regrouped = (
        f"  # {texts.rows_file.name} has the texts of {', '.join(texts.copied)}, where files alone gave too few\n"
        "  # documents. It is a copy: after a change of those files, delete it and this file, and run init again.\n"
        if texts.rows_file is not None
        else ""
    )
    columns = "".join(f"    {_quote(name)}: {_quote(column)}\n" for name, column in texts.columns.items())
    if columns:
        columns = f"  columns:  # fields of the files that have other names\n{columns}"
    heldout = (
        "  # heldout: 0.25  # the share of each domain's documents that only the result sees"
        if texts.heldout is None
        else f"  heldout: {texts.heldout:.2f}  # of each domain's documents, so that intervals have the six they need"
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
{columns}{heldout}

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
