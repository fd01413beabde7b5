"""Ask the models of a run questions with checkable answers, and count those they answer exactly.

    python examples/chat/exact_match.py RUN [RUN ...] [--models base,clm,fused] [--limit N] [--json]

RUN is a finished run's folder, and several are runs of the same file with other seeds. Each model is asked every
question of `questions.jsonl` in its own chat template, by transformers alone, and answers greedily with at most
`NEW_TOKENS` tokens. An answer is right if it is the expected one up to white space, upper case and a full stop at its
end. A model without a chat template cannot be asked. Answers are kept in RUN/exact_match, so they are not asked for
again; exact_match.json in the first RUN holds the numbers. Differences have 95% intervals of a bootstrap over
questions, drawn within each task; those of several runs are over seeds and questions together, as a study's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from fuselm.models.locating import Model, locate_model
from fuselm.results.seed_intervals import find_seed_interval
from fuselm.system import atomic_files, fingerprints

QUESTIONS = Path(__file__).with_name("questions.jsonl")
NEW_TOKENS = 12  # the longest answer has 6 of SmolLM2's
RESAMPLES = 10_000
PAIRS = (("fused", "clm"), ("fused", "base"), ("clm", "base"))


def find_models(run: Path, chosen: Sequence[str]) -> dict[str, tuple[Model, str]]:
    """Return those models of a run with their dtypes: sources, base, clm and fused.

    Servers are left out. Raises `ValueError` if the run has no model of a name.
    """
    options = yaml.safe_load((run / "config.yaml").read_text())
    folders = json.loads((run / "run.json").read_text())["folders"]
    given = {n: of for n, of in options["sources"].items() if "server" not in of} | {"base": options["target"]}
    names = [*given, "clm", "fused"]
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"--models: {run} has no model '{unknown[0]}'; it has {', '.join(names)}")
    found = {}
    for name in [name for name in names if name in chosen]:
        if name in given:
            found[name] = locate_model(given[name]["model"], revision=given[name]["revision"]), given[name]["dtype"]
        else:
            found[name] = locate_model(str(run / folders[f"train {name}"] / "model")), "auto"
    return found


def normalize(answer: str) -> str:
    """Return an answer without what does not make it another one."""
    return " ".join(answer.split()).removesuffix(".").casefold()


def ask(model: Model, prompts: Sequence[str], *, dtype: str, batch: int) -> list[str]:
    """Return a model's greedy answers, in the order of the prompts.

    Raises `ValueError` if it has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder, padding_side="left")
    if not tokenizer.chat_template:
        raise ValueError(f"{model.folder}: has no chat template, so it cannot be asked; leave it out of --models")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).to(device).eval()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    order = sorted(range(len(prompts)), key=lambda n: len(rendered[n]))  # little padding
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        asked = order[start : start + batch]
        inputs = tokenizer([rendered[n] for n in asked], return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(device)
        with torch.inference_mode():
            output = lm.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for n, answer in zip(asked, new, strict=True):
            answers[n] = answer
        print(f"\r  {start + len(asked)}/{len(order)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return answers


def ask_or_recall(
    name: str, model: Model, questions: Sequence[Mapping[str, str]], folders: Sequence[Path], *, dtype: str, batch: int
) -> list[str]:
    """Return a model's answers from the folders. If they are in none, ask, and keep them in the first one."""
    prompts = [question["question"] for question in questions]
    key = fingerprints.hash_lines([model.fingerprint, model.tokenizer_fingerprint, dtype, str(NEW_TOKENS), *prompts])
    files = [folder / f"{name}-{key}.json" for folder in folders]
    if not (there := [file for file in files if file.is_file()]):
        folders[0].mkdir(exist_ok=True)
        print(f"{name}: {model.folder}", file=sys.stderr)
        answers = ask(model, prompts, dtype=dtype, batch=batch)
        atomic_files.write_text(files[0], json.dumps(answers, ensure_ascii=False))
        there = files
    return json.loads(there[0].read_text(encoding="utf-8"))


def ask_runs(
    runs: Sequence[Path], chosen: Sequence[str], questions: Sequence[Mapping[str, str]], *, batch: int
) -> list[dict[str, list[str]]]:
    """Return the answers of each run's models. What two runs share, as the base, is asked once."""
    for run in runs:
        if not (run / "run.json").is_file():
            raise ValueError(f"{run}: no finished run there; start it with `fuselm run`, or name another folder")
    found = []
    for run in runs:
        folders = [of / "exact_match" for of in (run, *runs)]
        models = find_models(run, chosen).items()
        found.append(
            {
                name: ask_or_recall(name, model, questions, folders, dtype=dtype, batch=batch)
                for name, (model, dtype) in models
            }
        )
    return found


def resample_questions(tasks: Sequence[str], seed: int = 0) -> list[np.ndarray]:
    """Return, for each task, the positions of its questions drawn `RESAMPLES` times."""
    chance = np.random.default_rng(seed)
    named = np.array(tasks)
    members = [np.flatnonzero(named == task) for task in dict.fromkeys(tasks)]
    return [chance.choice(of, (RESAMPLES, len(of))) for of in members]


def compare(gains: np.ndarray, drawn: Sequence[np.ndarray]) -> dict:
    """Return the mean of the gains of each run (a row) at each question, with its interval.

    `drawn` has the positions of the questions of some tasks, many times each.
    """
    mean = gains.mean(axis=0)
    samples = sum(mean[of].sum(axis=1) for of in drawn) / sum(of.shape[1] for of in drawn)
    asked = np.concatenate([np.unique(of) for of in drawn])
    value, by_run = float(mean[asked].mean()), gains[:, asked].mean(axis=1).tolist()
    if len(gains) == 1:
        low, high = np.quantile(samples, [0.025, 0.975])
        return {"value": value, "low": float(low), "high": float(high)}
    interval = find_seed_interval(value, by_run, float(samples.std()))
    return {"value": value, "low": interval.low, "high": interval.high, "by_run": by_run}


def summarize(questions: Sequence[Mapping[str, str]], answers: Sequence[Mapping[str, Sequence[str]]]) -> dict:
    """Return each model's share of right answers by task and in all, and differences of models with intervals.

    `answers` are those of each run, by model.
    """
    tasks = [question["task"] for question in questions]
    expected = [normalize(question["answer"]) for question in questions]
    right = {
        name: np.array([[normalize(a) == e for a, e in zip(of[name], expected, strict=True)] for of in answers], float)
        for name in answers[0]
    }
    named, names = np.array(tasks), list(dict.fromkeys(tasks))
    drawn = resample_questions(tasks)
    differences = {}
    for first, second in PAIRS:
        if first in right and second in right:
            gains = right[first] - right[second]
            differences[f"{first}-{second}"] = {
                **{task: compare(gains, [of]) for task, of in zip(names, drawn, strict=True)},
                "all": compare(gains, drawn),
            }
    return {
        "questions": len(tasks),
        "runs": len(answers),
        "right": {
            name: {task: float(of[:, named == task].mean()) for task in names} | {"all": float(of.mean())}
            for name, of in right.items()
        },
        "differences": differences,
    }


def render_table(summary: Mapping) -> str:
    """Return the numbers as Markdown, in per cent of the questions."""
    models, differences = list(summary["right"]), summary["differences"]
    first = next(iter(differences), None)
    columns = [*models, *([] if first is None else [first.replace("-", " - ")])]
    lines = [f"| exactly right, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task in summary["right"][models[0]]:
        cells = [f"{100 * summary['right'][name][task]:.1f}" for name in models]
        cells += [] if first is None else [format_difference(differences[first][task])]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    lines.append("")
    for pair, of in differences.items():
        by_run = [f"{100 * value:+.1f}" for value in of["all"].get("by_run", ())]
        lines.append(f"{pair}: {format_difference(of['all'])}" + (f"; by run {', '.join(by_run)}" if by_run else ""))
    return "\n".join(lines)


def format_difference(of: Mapping[str, float]) -> str:
    return f"{100 * of['value']:+.1f} [{100 * of['low']:+.1f}, {100 * of['high']:+.1f}]"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a finished run's folder")
    parser.add_argument("--models", default="base,clm,fused", help="of the run, sources too, with commas between")
    parser.add_argument("--limit", type=int, help="questions of each task, to try it out")
    parser.add_argument("--batch", type=int, default=25, help="questions that are answered together")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    asked = parser.parse_args(arguments)
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    if asked.limit is not None:
        of_task: dict[str, list] = {}
        for question in questions:
            of_task.setdefault(question["task"], []).append(question)
        questions = [question for of in of_task.values() for question in of[: asked.limit]]
    try:
        answers = ask_runs(asked.runs, asked.models.split(","), questions, batch=asked.batch)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = summarize(questions, answers)
    atomic_files.write_text(asked.runs[0] / "exact_match.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1) if asked.json else render_table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
