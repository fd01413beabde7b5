"""Compare what pruning removes by each importance: bits per byte of held-out text, before and after recovery.

    python benchmarks/importances.py [RUN_FILE] [--importances param_first,activations] [--ratio 0.2] [--json]

The model is the first source of the run file that has its name (by default `smollm2` of examples/prune.yaml). All
importances read the same beginnings of training documents, lose the same share of parameters in MLPs, and are scored on
the same held-out documents. Recovery trains on the training documents alone, twice, two documents a step, with AdamW at
the rate of the run file, constant: every pruned model reads the same documents in the same order. Nothing is kept.
"""

import argparse
import copy
import json
import random
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fuselm.models import forward
from fuselm.models.loading import load_model, load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.models.pruning import activations, importance
from fuselm.models.pruning.choices import BY_GRADIENT, IMPORTANCES
from fuselm.models.pruning.gradients import compute_gradients
from fuselm.models.pruning.removal import remove_units
from fuselm.results import scoring
from fuselm.runs import config
from fuselm.runs.options.sources import ModelOptions
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.pruning.calibration_texts import draw_samples
from fuselm.runs.pruning.options import SAMPLES, TOKENS, read_prune_options
from fuselm.runs.pruning.plan import plan_pruning

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "examples/prune.yaml"
PASSES, DOCUMENTS = 2, 2  # of recovery: over the training documents, and in a step


def measure(run_file: Path, names: list[str], ratio: float, samples: int, show) -> dict[str, dict[str, float]]:
    """Return bits per byte of held-out text by importance: `pruned`, and `recovered`."""
    run = config.load(run_file)
    spec = run.sources["smollm2"].model
    model = locate_model(spec)
    pipeline = Pipeline(run.model_copy(update={"target": ModelOptions(model=spec)}), Console(quiet=True))
    splits = {name: [d for d in pipeline.documents if d.split == name] for name in ("train", "heldout")}
    vocabulary = load_vocabulary(model)
    texts: dict[str, list[str]] = {}
    for document in splits["train"]:
        texts.setdefault(document.domain, []).append(document.text)
    read = draw_samples(texts, vocabulary, model.context_token, count=samples, length=TOKENS, seed=0)
    plan = plan_pruning(model, read_prune_options(ratio=ratio))
    whole = load_model(model, dtype="float32")
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    nothing = lambda tokens: None  # noqa: E731
    gradients = None
    if set(names) & set(BY_GRADIENT):
        gradients = compute_gradients(whole, read, squares=True, advance=nothing)

    def score(pruned) -> float:
        layer = forward.find_output_layer(pruned)
        with torch.autocast("cpu", torch.bfloat16):
            found = scoring.score_documents(pruned, layer, vocabulary, model.context_token, splits["heldout"])
        return scoring.compute_bits_per_byte(found)["average"]

    def score_units(name: str) -> dict[str, importance.Scores]:
        if name == "activations":
            return activations.measure_activations(whole, plan.couplings, read, with_layers=False, advance=nothing)[0]
        if name == "random":
            return {c.structure: importance.draw_scores(c, n) for n, c in enumerate(plan.couplings)}
        mean, squares = ({}, {}) if gradients is None else (gradients.mean, gradients.squares)
        score_tensor = lambda t: importance.score_weights(name, weights[t], mean.get(t), squares.get(t))  # noqa: E731
        return {c.structure: importance.score_units(c, score_tensor) for c in plan.couplings}

    result = {"none": {"pruned": score(whole)}}
    show("none", result["none"])
    for name in names:
        units = score_units(name)
        kept = {what: importance.choose_units(units[what], plan.after[what]) for what in units}
        pruned = remove_units(copy.deepcopy(whole), plan.couplings, kept)
        found = {"pruned": score(pruned)}
        train(pruned, [tokenize(vocabulary, model, d.text) for d in splits["train"]], run.train.learning_rate)
        result[name] = found | {"recovered": score(pruned)}
        show(name, result[name])
    return result


def tokenize(vocabulary, model, text: str) -> torch.Tensor:
    return torch.tensor([model.context_token, *vocabulary.segment(text).ids])


def train(model, samples: list[torch.Tensor], rate: float) -> None:
    """Train on samples in an order that is the same for every model."""
    optimizer, order = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), random.Random(0)
    model.train()
    for _ in range(PASSES):
        shuffled = order.sample(samples, len(samples))
        for begin in range(0, len(shuffled), DOCUMENTS):
            batch = shuffled[begin : begin + DOCUMENTS]
            tokens = sum(len(ids) - 1 for ids in batch)
            for ids in batch:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
                loss = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum") / tokens
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", nargs="?", type=Path, default=RUN_FILE)
    parser.add_argument("--importances", default=",".join(IMPORTANCES), help=f"of {', '.join(IMPORTANCES)}")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="texts to score by")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    def show(name: str, found: dict[str, float]) -> None:
        print(name, " ".join(f"{what} {value:.4f}" for what, value in found.items()), file=sys.stderr, flush=True)

    names = arguments.importances.split(",")
    found = measure(arguments.run_file, names, arguments.ratio, arguments.samples, show)
    if arguments.json:
        json.dump(found, sys.stdout)
        return
    table = Table("importance", "pruned", "recovered on the text")
    for name, of in found.items():
        table.add_row(name, *(f"{of[what]:.4f}" if what in of else "" for what in ("pruned", "recovered")))
    Console().print(table)


if __name__ == "__main__":
    main()
