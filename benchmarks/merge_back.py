"""Measure what merging a chat model back wins: bits per byte of held-out texts, and of answers in conversations.

    python benchmarks/merge_back.py [CHAT] [--fused FUSED] [--rate 5e-4] [--json]

CHAT is a model that learned conversations, by default that of `fuselm run examples/chat.yaml`. Text is fused into it as
examples/quickstart.yaml does, at a higher rate, or was before (FUSED). Scored are the model that CHAT comes from
(`base`), CHAT (`chat`), the model that text was fused into (`fused`), and merges of the last two. The texts are the
first of the held-out documents of each domain; the answers are those of the first held-out conversations of each domain
of examples/chat. Merges are not kept. `soup` learns its shares on the development split of both. `fisher` weights every
weight of CHAT and FUSED by its mean squared gradient on development conversations and texts (Matena and Raffel, arXiv
2111.09832), scaled so that both models' sum to the same; fuselm has no such method.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuselm
from fuselm.models.pruning.gradients import compute_gradients
from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples/quickstart.yaml"
BASE = ROOT / "models/smollm2-135m-instruct.gguf"  # of examples/chat.yaml
CHAT = ROOT / "runs/chat/model"
CONVERSATIONS = ROOT / "examples/chat/conversations.jsonl"
TEXTS, ANSWERS = 5, 8  # of each domain
MERGES: dict[str, dict[str, Any]] = {  # of `chat` and `fused`
    "slerp, t 0.5": {"method": "slerp", "parameters": {"t": 0.5}},
    "task_arithmetic, weight 0.5": {"method": "task_arithmetic", "parameters": {"weight": 0.5}},
    "ties, density 0.5": {"method": "ties", "parameters": {"weight": 1.0, "density": 0.5}},
    "dare_linear, density 0.5": {"method": "dare_linear", "parameters": {"weight": 0.5, "density": 0.5}},
    "sce": {"method": "sce"},
    "widen": {"method": "widen"},
    "soup": {"method": "soup", "parameters": {"steps": 40}},  # its texts are added
}
FISHER_TOKENS = 512  # of a text


def measure(
    chat: Path, fused: Path | None, rate: float, show: Callable[[str, dict[str, float]], None]
) -> dict[str, dict[str, float]]:
    """Return bits per byte of `texts` and `answers`, by model."""
    changes = [f"target={chat}", f"train.learning_rate={rate}", f"output={ROOT / 'runs/merge-back-chat'}"]
    run = config.load(RUN_FILE, changes)
    pipeline = Pipeline(run, Console(stderr=True))
    fused = fused or pipeline.train_method("fused") / "model"
    split = {name: read_split(pipeline, name) for name in ("dev", "heldout")}
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for what, rows in split["heldout"].items():
            write(folder / f"{what}.jsonl", rows)
        write(folder / "dev.jsonl", [row for rows in split["dev"].values() for row in rows])

        def score(name: str, model: str | Path) -> None:
            scored = {w: fuselm.score_texts(model, folder / f"{w}.jsonl", quiet=True) for w in split["heldout"]}
            result[name] = {what: found["average"]["bits_per_byte"] for what, found in scored.items()}
            show(name, result[name])

        for name, model in {"base": BASE, "chat": chat, "fused": fused}.items():
            score(name, model)
        for name, how in MERGES.items():
            models, base = ([fused], chat) if how["method"] == "slerp" else ([chat, fused], BASE)
            texts = folder / "dev.jsonl" if how["method"] == "soup" else None
            base = None if texts else base
            merged = fuselm.merge_models(models, folder / "merged" / name, base=base, texts=texts, quiet=True, **how)
            score(name, merged)
        score("fisher", merge_by_fisher(chat, fused, split["dev"], folder / "merged" / "fisher"))
    return result


def read_split(pipeline: Pipeline, split: str) -> dict[str, list[dict[str, Any]]]:
    """Return the first texts and conversations of each domain."""
    texts = [{"text": d.text, "domain": d.domain} for d in pipeline.documents if d.split == split]
    rows = map(json.loads, CONVERSATIONS.read_text().splitlines())
    answers = [{"messages": r["messages"], "domain": r["domain"]} for r in rows if r["split"] == split]
    return {"texts": take(texts, TEXTS), "answers": take(answers, ANSWERS)}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def merge_by_fisher(chat: Path, fused: Path, rows: dict[str, list[dict[str, Any]]], out: Path) -> Path:
    """Write the mean of two models, each weight weighted by its mean squared gradient on its model's own texts."""
    tokenizer = AutoTokenizer.from_pretrained(chat)
    conversations = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows["answers"]]
    models, squares = [], []
    for folder, texts in ((chat, conversations), (fused, [row["text"] for row in rows["texts"]])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        samples = [torch.tensor(tokenizer(text)["input_ids"][:FISHER_TOKENS]) for text in texts]
        found = compute_gradients(model, samples, squares=True, advance=lambda tokens: None).squares
        assert found is not None
        total = sum(float(tensor.sum()) for tensor in found.values())
        squares.append({name: tensor / total for name, tensor in found.items()})
        models.append(model)
    merged, other = models
    with torch.no_grad():
        for (name, mine), theirs in zip(merged.named_parameters(), other.parameters(), strict=True):
            least = torch.finfo(torch.float32).tiny
            first, second = (square[name].double() + least for square in squares)
            mine.copy_((first * mine + second * theirs) / (first + second))
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def take(rows: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the first rows of each domain."""
    seen: Counter[str] = Counter()
    taken = []
    for row in rows:
        seen[row["domain"]] += 1
        if seen[row["domain"]] <= count:
            taken.append(row)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chat", nargs="?", type=Path, default=CHAT, help="a folder with a model")
    parser.add_argument("--fused", type=Path, help="a folder with a model that text was fused into; else it is trained")
    parser.add_argument("--rate", type=float, default=5e-4, help="of learning the text")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    def show(name: str, found: dict[str, float]) -> None:
        print(name, " ".join(f"{what} {value:.4f}" for what, value in found.items()), file=sys.stderr, flush=True)

    if not arguments.chat.is_dir():
        parser.error(f"{arguments.chat}: no model there; run `fuselm run examples/chat.yaml` first")
    found = measure(arguments.chat, arguments.fused, arguments.rate, show)
    if arguments.json:
        json.dump(found, sys.stdout)
        return
    table = Table("model", "texts", "answers")
    for name, of in found.items():
        table.add_row(name, *(f"{of[what]:.4f}" for what in ("texts", "answers")))
    Console().print(table)


if __name__ == "__main__":
    main()
