"""Measure what merging a chat model back wins: bits per byte of held-out texts, and of answers in conversations.

    python benchmarks/merge_back.py [CHAT] [--rate 5e-4] [--json]

CHAT is a model that learned conversations, by default that of `fuselm run examples/chat.yaml`. Text is fused into it as
examples/quickstart.yaml does, at a higher rate. Scored are the model that CHAT comes from (`base`), CHAT (`chat`), the
model that text was fused into (`fused`), and merges of the last two. The texts are the first of the held-out documents
of each domain; the answers are those of the first held-out conversations of each domain of examples/chat. Merges are
not kept.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fuselm
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
}


def measure(chat: Path, rate: float, show: Callable[[str, dict[str, float]], None]) -> dict[str, dict[str, float]]:
    """Return bits per byte of `texts` and `answers`, by model."""
    changes = [f"target={chat}", f"train.learning_rate={rate}", f"output={ROOT / 'runs/merge-back-chat'}"]
    run = config.load(RUN_FILE, changes)
    pipeline = Pipeline(run, Console(stderr=True))
    fused = pipeline.train_method("fused") / "model"
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        held_out = [{"text": d.text, "domain": d.domain} for d in pipeline.documents if d.split == "heldout"]
        rows = map(json.loads, CONVERSATIONS.read_text().splitlines())
        answers = [{"messages": r["messages"], "domain": r["domain"]} for r in rows if r["split"] == "heldout"]
        files = {"texts": take(held_out, TEXTS), "answers": take(answers, ANSWERS)}
        for name, taken in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taken))

        def score(name: str, model: str | Path) -> None:
            scored = {f: fuselm.score_texts(model, folder / f"{f}.jsonl", quiet=True) for f in files}
            result[name] = {f: found["average"]["bits_per_byte"] for f, found in scored.items()}
            show(name, result[name])

        for name, model in {"base": BASE, "chat": chat, "fused": fused}.items():
            score(name, model)
        for name, how in MERGES.items():
            is_arc = how["method"] == "slerp"
            models, start = ([fused], chat) if is_arc else ([chat, fused], BASE)
            merged = fuselm.merge_models(models, folder / "merged" / name, base=start, quiet=True, **how)
            score(name, merged)
    return result


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
    parser.add_argument("--rate", type=float, default=5e-4, help="of learning the text")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    def show(name: str, found: dict[str, float]) -> None:
        print(name, " ".join(f"{what} {value:.4f}" for what, value in found.items()), file=sys.stderr, flush=True)

    if not arguments.chat.is_dir():
        parser.error(f"{arguments.chat}: no model there; run `fuselm run examples/chat.yaml` first")
    found = measure(arguments.chat, arguments.rate, show)
    if arguments.json:
        json.dump(found, sys.stdout)
        return
    table = Table("model", "texts", "answers")
    for name, of in found.items():
        table.add_row(name, *(f"{of[what]:.4f}" for what in ("texts", "answers")))
    Console().print(table)


if __name__ == "__main__":
    main()
