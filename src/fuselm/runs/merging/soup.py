"""Choose the shares of a soup on texts: on a grid, and then learned for each linear map.

The score is bits per byte, in the mean over domains, and the loss is that of training on the text alone. So a soup
needs texts that nothing was trained on and that nothing is judged by: in a run, the development split.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.documents.corpus import Document
from fuselm.models import probe
from fuselm.models.merging.soups import choose_on_grid, group_parameters, learn_shares
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import scoring
from fuselm.runs.merging.merge import MergePlan, read_tensors
from fuselm.system import atomic_files, machine
from fuselm.system.progress import Progress
from fuselm.training.batches import Batches, Collator
from fuselm.training.objective import fusion_loss
from fuselm.training.trainable import compute_loss_in_forward

FILE = "soup.json"  # beside the weights: the models' shares of every group, in their order, and what was tried
BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Soup:
    """Hold the shares of each group, the group of each tensor, and bits per byte of what was tried."""

    shares: dict[str, list[float]]
    groups: dict[str, str]
    tried: list[dict[str, Any]]

    def find_shares(self, tensor: str) -> list[float]:
        """Return the models' shares of a tensor."""
        return self.shares[self.groups[tensor]]


def choose_soup(plan: MergePlan, documents: Sequence[Document], vocabulary: Vocabulary, progress: Progress) -> Soup:
    """Choose shares by a plan's parameters on documents; raise `ValueError` if a model's tensors cannot be mixed."""
    machine.use_free_cores()
    asked, first = plan.options.find_parameters("", 0.0), plan.folders[0].model
    if not plan.vocabulary.is_shared:
        raise ValueError("soup: the models have other tokens; merge models with the same ones")
    model, layer = probe.load_tried_model(first, dtype="float32")
    named = group_parameters(model)
    if unknown := sorted(set(named) ^ set(plan.tensors)):
        raise ValueError(f"soup: transformers calls the tensors of {first.name} otherwise ({unknown[0]}); take linear")
    order = list(dict.fromkeys(named.values()))
    groups = {name: order.index(group) for name, group in named.items()}
    read = partial(read_tensors, plan)
    tried: list[dict[str, Any]] = []

    def score() -> float:
        model.eval()
        scores = scoring.score_documents(
            model, layer, vocabulary, first.context_token, documents, batch_tokens=BATCH_TOKENS
        )
        return scoring.compute_bits_per_byte(scores)["average"]

    def note(what: dict[str, Any], value: float) -> None:
        tried.append({**what, "bits_per_byte": value})
        progress.note(f"soup: {', '.join(f'{n} {v}' for n, v in what.items())}: {value:.4f} bits/byte")
        progress.advance(1)

    steps = asked["steps"] if asked["learn"] else 0
    progress.start(total=steps, unit="steps")
    on_grid = lambda shares, value: note({"shares": shares}, value)  # noqa: E731
    shares, value = choose_on_grid(model, groups, read, grid=asked["grid"], score=score, on_score=on_grid)
    if steps:
        losses = _build_losses(model, layer, vocabulary, first.context_token, documents, steps, plan.options.seed)
        learned, reached = learn_shares(
            model,
            groups,
            read,
            shares,
            losses=losses,
            learning_rate=asked["learning_rate"],
            pull=asked["pull"],
            score=score,
            score_every=max(1, steps // 4),
            on_score=lambda step, value: note({"step": step}, value),
        )
        shares = learned if reached < value else shares
    rounded = {group: [round(float(s), 6) for s in shares[n]] for n, group in enumerate(order)}
    return Soup(shares=rounded, groups=named, tried=tried)


def _build_losses(
    model: torch.nn.Module,
    layer: Any,
    vocabulary: Vocabulary,
    context_token: int,
    documents: Sequence[Document],
    steps: int,
    seed: int,
) -> list[Callable[[], Float[Tensor, ""]]]:
    """Return the loss of each step: the mean cross-entropy of a batch of documents."""
    passes = -(-steps // max(1, len(documents) // 2))
    batches = Batches(
        documents, vocabulary, None, passes=passes, batch_documents=2, pack_tokens=None, seed=seed, processes=1
    )
    collate = Collator(context_token, packed=False)
    logits_forward = model.forward
    compute_loss_in_forward(model, layer)
    loss_forward = model.forward
    model.forward = logits_forward  # scoring calls the decoder, as before

    def compute(number: int) -> Float[Tensor, ""]:
        inputs = collate([batches[number % len(batches)]])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "shift_labels"}
        labels = inputs.pop("labels")
        mask = labels != -100
        count = int(mask.sum())

        def loss_fn(hidden: Float[Tensor, "tokens hidden"], head: Any) -> dict[str, Tensor]:
            return {"loss": fusion_loss(hidden, head, labels[mask], None, 1.0, count=count).total}

        return loss_forward(**inputs, token_mask=mask, loss_fn=loss_fn)["loss"]

    return [partial(compute, number) for number in range(steps)]


def prepare_soup(
    plan: MergePlan, documents: Sequence[Document], vocabulary: Vocabulary, out: Path, progress: Progress
) -> MergePlan:
    """Return the plan with the shares of its soup, which are chosen once and written to `out`."""
    file = out / FILE
    if file.is_file():
        found = json.loads(file.read_bytes())
        soup = Soup(**{name: found[name] for name in ("shares", "groups", "tried")})
    else:
        soup = choose_soup(plan, documents, vocabulary, progress)
        out.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(file, json.dumps(asdict(soup), indent=1) + "\n")
    return replace(plan, shares=soup.find_shares)
