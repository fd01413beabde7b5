"""Compute the log-probabilities that lm-eval asks for, so that questions about one text cost one reading of it.

lm-eval reads every context with every continuation by itself. Here what several of them begin with is read once: the
question before its choices, the examples before all questions. Logits are made for the continuations alone. A model
that takes no mask of its own reads each sequence by itself, and only skips those that another one begins with.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models import forward
from fuselm.models.token_trees import TokenTree, can_read_trees, compute_tree_states, grow_trees
from fuselm.system.progress import Progress

GENERATED_AT_ONCE = 64  # questions between two lines of progress
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the tokens of context and continuation


class SharedReadingLM(HFLM):
    """Answer lm-eval's requests with a loaded model."""

    def __init__(
        self, model: PreTrainedModel, layer: forward.OutputLayer, folder: str, *, batch_tokens: int, progress: Progress
    ):
        super().__init__(pretrained=model, tokenizer=folder, batch_size=max(1, batch_tokens // 256))
        self._layer = layer
        self._batch_tokens = batch_tokens
        self._progress = progress

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        inputs = [cut_input(context, continuation, self.max_length) for _, context, continuation in requests]
        shares = can_read_trees(self.model, self._layer, max(map(len, inputs), default=0))
        trees, places = grow_trees(inputs, self._batch_tokens) if shares else keep_apart(inputs)
        by_tree: dict[int, list[int]] = {}
        for number, sequence in enumerate(inputs):
            by_tree.setdefault(places[sequence][0], []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        sizes = [len(tree.tokens) for tree in trees]
        self._progress.start(sum(sizes), unit="tokens")
        for batch in forward.group_into_batches(sizes, self._batch_tokens):
            some = [trees[i] for i in batch]
            hidden = compute_tree_states(self.model, self._layer, some) if shares else self._read_rows(some)
            numbers = [(row, number) for row, i in enumerate(batch) for number in by_tree[i]]
            continuations = [requests[number][2] for _, number in numbers]
            width = hidden.shape[1]
            at = [
                row * width + place
                for (row, number), own in zip(numbers, continuations, strict=True)
                for place in places[inputs[number]][1][-len(own) :]
            ]
            gold = torch.tensor([token for own in continuations for token in own], device=hidden.device)
            logprobs, greedy = score_tokens(
                hidden.flatten(0, 1), self._layer, torch.tensor(at, device=gold.device), gold
            )
            counts = [len(own) for own in continuations]
            for (_, number), own, hits in zip(numbers, logprobs.split(counts), greedy.split(counts), strict=True):
                answers[number] = (float(own.sum()), bool(hits.all()))
            self._progress.advance(sum(sizes[i] for i in batch))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether each of its tokens is the most probable one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each request, some requests at a time."""
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n].args[0]))
        written: dict[int, str] = {}
        self._progress.start(len(requests), unit="questions")
        for start in range(0, len(order), GENERATED_AT_ONCE):
            some = order[start : start + GENERATED_AT_ONCE]
            texts = super().generate_until([requests[n] for n in some], disable_tqdm=True)
            written |= dict(zip(some, texts, strict=True))
            self._progress.advance(len(some))
        return [written[n] for n in range(len(requests))]

    def _read_rows(self, rows: Sequence[TokenTree]) -> torch.Tensor:
        """Return the hidden states of sequences, each a row of its own."""
        width = max(len(row.tokens) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens)], mask[number, : len(row.tokens)] = torch.tensor(row.tokens), 1
        with torch.inference_mode():
            return forward.compute_hidden_states(self.model, self._layer, ids.to(self.device), mask.to(self.device))


def score_tokens(
    hidden: Float[Tensor, "states hidden"],
    layer: forward.OutputLayer,
    at: Int[Tensor, "asked"],
    gold: Int[Tensor, "asked"],
) -> tuple[Float[Tensor, "asked"], Bool[Tensor, "asked"]]:
    """Return the log-probability of each asked-for token after state `at`, and whether it is the most probable one.

    Several may come after one state; its logits are made once, a chunk of states at a time.
    """
    states, place = torch.unique(at, return_inverse=True)
    order = place.argsort()
    ends = torch.bincount(place, minlength=len(states)).cumsum(0).tolist()
    logprobs, greedy = torch.zeros(len(at), dtype=torch.float64), torch.zeros(len(at), dtype=torch.bool)
    with torch.inference_mode():
        for rows, logits in layer.compute_logits_by_chunk(hidden[states]):
            own = order[ends[rows.start - 1] if rows.start else 0 : ends[rows.stop - 1]]
            row, token = place[own] - rows.start, gold[own]
            survey, found = forward.survey_logits(logits), logits[row, token]
            logprobs[own.cpu()] = (found.float() - survey.log_z[row]).double().cpu()
            largest = survey.maxima.float().amax(1) if survey.maxima.shape[1] else survey.log_z - torch.inf
            maybe = (found.float() >= largest[row]).nonzero()[:, 0]  # several ids may have the largest logit
            tops = {n: int(logits[n].argmax()) for n in set(row[maybe].tolist())}
            hits = [tops[n] == t for n, t in zip(row[maybe].tolist(), token[maybe].tolist(), strict=True)]
            greedy[own[maybe].cpu()] = torch.tensor(hits, dtype=torch.bool)
    return logprobs, greedy


def cut_input(context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[int, ...]:
    """Return the tokens to read for a request, cut on the left to the model's context, as lm-eval does."""
    return tuple([*context, *continuation][-(max_length + 1) :][:-1])


def keep_apart(
    sequences: Sequence[tuple[int, ...]],
) -> tuple[list[TokenTree], dict[tuple[int, ...], tuple[int, list[int]]]]:
    """Return rows and places as `grow_trees` does, where a row is one sequence; none is the beginning of another."""
    rows: list[TokenTree] = []
    places: dict[tuple[int, ...], tuple[int, list[int]]] = {}
    for sequence in sorted(set(sequences), reverse=True):
        if not rows or tuple(rows[-1].tokens[: len(sequence)]) != sequence:
            rows.append(TokenTree(tokens=list(sequence)))
        places[sequence] = len(rows) - 1, list(range(len(sequence)))
    return rows, places
