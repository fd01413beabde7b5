r"""Ask the models of a run language-model tasks on its held-out documents by lm-eval, without a network.

    pip install '.[tasks]'
    python examples/tasks/run.py RUN [--models base,clm,fused] [--add NAME=MODEL]... [--limit N] [--json]

RUN is a finished run's folder: base, clm, fused and the sources of it are asked, and what `--add` names (folders, GGUF
files, hub ids) beside them, or in their place if it has their name. Start it where the run was started. `items.py` says
what is asked, `results.py` what the numbers mean. All is written to RUN/tasks: the questions, each with a task file for
lm-eval; each model's answers, which are not asked for again; `results.json` and `results.md`. So lm-eval itself can ask
any model the same:

    lm_eval run --model hf --model_args pretrained=MODEL softmax_dtype=float32 --include_path RUN/tasks \
        --tasks cloze_english
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import items
import results

from fuselm.documents.document import Document
from fuselm.documents.document_list import read_documents
from fuselm.models.locating import Model, locate_model
from fuselm.system import atomic_files, fingerprints

HERE = Path(__file__).parent
KINDS = {"cloze": (items.cloze, "cloze.yaml"), "continuation": (items.continuation, "choice.yaml")}


def evaluate(
    run: Path, *, chosen: Sequence[str] | None, added: Mapping[str, str], limit: int | None, batch: int
) -> dict:
    """Ask all models, and write the answers into the run's folder.

    Raises `ValueError` on a run that is not finished, and on models that are not there.
    """
    if not (run / "run.json").is_file():
        raise ValueError(f"{run}: no finished run there; start it with `fuselm run`, or name another folder")
    folders = {name: run / path for name, path in json.loads((run / "run.json").read_text())["folders"].items()}
    models = find_models(run, folders, chosen, set(added))
    models |= {name: (locate_model(spec), "auto") for name, spec in added.items()}
    out = run / "tasks"
    tasks = write_tasks(read_documents(folders["corpus"], "heldout"), out)
    answers = {}
    for name, (model, dtype) in models.items():
        answers[name] = remembered(name, model, tasks, out, dtype=dtype, limit=limit, batch=batch)
    summary = {"limit": limit, "lm_eval": metadata.version("lm_eval")} | results.summarize(answers, tasks)
    atomic_files.write_text(out / "results.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    atomic_files.write_text(out / "results.md", results.page(summary))
    return summary


def find_models(
    run: Path, folders: Mapping[str, Path], chosen: Sequence[str] | None, replaced: set[str]
) -> dict[str, tuple[Model, str]]:
    """Return the run's models with their dtypes: sources, base, clm and fused.

    Servers are left out, and so is a source that is the base.
    """
    options = yaml.safe_load((run / "config.yaml").read_text())
    base = folders["evaluate base"]
    sources = {n: of for n, of in options["sources"].items() if "server" not in of and folders[f"evaluate {n}"] != base}
    given = sources | {"base": options["target"]}
    names = [*given, "clm", "fused"]
    if unknown := [name for name in chosen or () if name not in names]:
        raise ValueError(f"--models: {run} has no model '{unknown[0]}'; it has {', '.join(names)}")
    found = {}
    for name in [name for name in names if name in (chosen or names) and name not in replaced]:
        if name in given:
            of = given[name]
            found[name] = (locate_model(of["model"], revision=of["revision"]), of["dtype"])
        else:
            found[name] = (locate_model(str(folders[f"train {name}"] / "model")), "auto")
    return found


def write_tasks(documents: Sequence[Document], out: Path) -> results.Tasks:
    """Write questions and a task file for each kind and domain that has at least two.

    Raises `ValueError` if there are none at all.
    """
    tasks = {}
    out.mkdir(exist_ok=True)
    for kind, (make, template) in KINDS.items():
        for domain in sorted({d.domain for d in documents}):
            rows = make([d for d in documents if d.domain == domain])
            if len(rows) > 1:
                task = re.sub(r"\W+", "_", f"{kind}_{domain}")
                tasks[task] = (kind, domain)
                file = out / f"{task}.jsonl"
                atomic_files.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                text = (HERE / template).read_text()
                where = {"task": task, "dataset_kwargs": {"data_files": {"test": str(file.resolve())}}}
                atomic_files.write_text(out / f"{task}.yaml", text + yaml.safe_dump(where))
    if not tasks:
        raise ValueError(f"{out.parent}: its held-out documents are too few or too short to ask about; hold out more")
    return tasks


def remembered(
    name: str, model: Model, tasks: results.Tasks, out: Path, *, dtype: str, limit: int | None, batch: int
) -> dict:
    """Return a model's answers, and ask for them if they are not there."""
    questions = [
        (out / f"{task}.jsonl").read_text() + (HERE / KINDS[k][1]).read_text() for task, (k, _) in tasks.items()
    ]
    of = [model.fingerprint, model.tokenizer_fingerprint, dtype, str(limit), metadata.version("lm_eval"), *questions]
    file = out / "answers" / f"{name}-{fingerprints.hash_lines(of)}.json"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        print(f"{name}: {model.folder}", file=sys.stderr)
        atomic_files.write_text(file, json.dumps(ask(model, tasks, out, dtype=dtype, limit=limit, batch=batch)))
    return json.loads(file.read_text())


def ask(model: Model, tasks: results.Tasks, out: Path, *, dtype: str, limit: int | None, batch: int) -> dict:
    """Return a model's answers by lm-eval: its numbers, and each question's document and parts."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval takes all cores for the error of a perplexity
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = HFLM(
        pretrained=str(model.folder),
        device="cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu",
        dtype=dtype,
        softmax_dtype="float32",  # log-probabilities in bfloat16 are equal too often
        batch_size=batch,
    )
    with contextlib.redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=asked,
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(out), include_defaults=False),
            limit=limit,
            bootstrap_iters=1000,
        )
    return {
        task: {
            "values": {
                key.removesuffix(",none"): v for key, v in found["results"][task].items() if key.endswith(",none")
            },
            "items": [
                {"document": sample["doc"]["document"]} | {metric: sample[metric] for metric in sample["metrics"]}
                for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
            ],
        }
        for task in tasks
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--models", help="of the run, with commas between; default: all")
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME=MODEL", help="another model; may be repeated"
    )
    parser.add_argument("--limit", type=int, help="questions of a task, to try it out")
    parser.add_argument("--batch", type=int, default=8, help="questions of one forward pass")
    parser.add_argument("--json", action="store_true", help="print results.json instead of results.md")
    asked = parser.parse_args(arguments)
    try:
        if asked.limit is not None and asked.limit < 2:
            raise ValueError(f"--limit {asked.limit}: a standard error needs 2 questions or more")
        if wrong := [pair for pair in asked.add if not re.match(r"[\w.-]+=.", pair)]:
            raise ValueError(f"--add {wrong[0]}: not a name and a model; write it as NAME=MODEL")
        summary = evaluate(
            asked.run,
            chosen=asked.models.split(",") if asked.models else None,
            added=dict(pair.split("=", 1) for pair in asked.add),
            limit=asked.limit,
            batch=asked.batch,
        )
    except (ValueError, OSError, metadata.PackageNotFoundError) as error:
        missing = isinstance(error, metadata.PackageNotFoundError)
        print(
            "error: lm-eval is not installed; pip install '.[tasks]'" if missing else f"error: {error}", file=sys.stderr
        )
        return 2
    print(json.dumps(summary, indent=1, ensure_ascii=False) if asked.json else results.page(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
