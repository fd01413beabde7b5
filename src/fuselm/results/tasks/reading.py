"""Compute the log-probabilities that lm-eval asks for, so that questions about one text cost one reading of it.

lm-eval reads every context with every continuation by itself. Here a sequence that another one begins with is not read
again: what comes after it changes nothing. Logits are made for the continuations alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from fuselm.models import forward
from fuselm.system.progress import Progress

GENERATED_AT_ONCE = 64  # questions between two lines of progress
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, the tokens of context and continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Hold where in which sequence a request is answered."""

    owner: int
    first: int  # row of the first token of the continuation
    continuation: Sequence[int]


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
        asked, sequences = plan_reading(requests, self.max_length)
        by_owner: dict[int, list[int]] = {}
        for number, request in enumerate(asked):
            by_owner.setdefault(request.owner, []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        self._progress.start(sum(map(len, sequences)), unit="tokens")
        for batch in forward.group_into_batches([len(s) for s in sequences], self._batch_tokens):
            hidden = self._read([sequences[i] for i in batch])
            numbers = [(row, number) for row, i in enumerate(batch) for number in by_owner[i]]
            rows = torch.cat(
                [hidden[row, asked[n].first : asked[n].first + len(asked[n].continuation)] for row, n in numbers]
            )
            gold = torch.tensor([t for _, n in numbers for t in asked[n].continuation], device=rows.device)
            logprobs, greedy = self._score(rows, gold)
            sizes = [len(asked[n].continuation) for _, n in numbers]
            for (_, number), own, hits in zip(numbers, logprobs.split(sizes), greedy.split(sizes), strict=True):
                answers[number] = (float(own.sum()), bool(hits.all()))
            self._progress.advance(sum(len(sequences[i]) for i in batch))
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

    def _read(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        width = max(map(len, sequences))
        ids, mask = torch.zeros(len(sequences), width, dtype=torch.long), torch.zeros(len(sequences), width)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
        with torch.inference_mode():
            return forward.compute_hidden_states(
                self.model, self._layer, ids.to(self.device), mask.long().to(self.device)
            )

    def _score(self, hidden: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability of each token in float32, and whether it is the most probable one."""
        logprobs, greedy = [], []
        width = hidden.shape[-1] if self._layer.weight is None else len(self._layer.weight)
        with torch.inference_mode():
            for rows in forward.slice_rows(len(hidden), width):
                scores = torch.log_softmax(self._layer.compute_logits(hidden[rows]), dim=-1)
                logprobs.append(scores.gather(1, gold[rows, None])[:, 0])
                greedy.append(scores.argmax(dim=-1) == gold[rows])
        return torch.cat(logprobs).double().cpu(), torch.cat(greedy).cpu()


def plan_reading(requests: Sequence[Request], max_length: int) -> tuple[list[_Asked], list[tuple[int, ...]]]:
    """Return where each request is answered, and the sequences to read: none is the beginning of another.

    Sequences are cut on the left to the model's context, as lm-eval does.
    """
    inputs = [tuple((context + continuation)[-(max_length + 1) :][:-1]) for _, context, continuation in requests]
    owners: dict[tuple[int, ...], int] = {}
    sequences: list[tuple[int, ...]] = []
    for sequence in sorted(set(inputs), reverse=True):
        if not sequences or sequences[-1][: len(sequence)] != sequence:
            sequences.append(sequence)
        owners[sequence] = len(sequences) - 1
    asked = [
        _Asked(owner=owners[sequence], first=len(sequence) - len(continuation), continuation=continuation)
        for sequence, (_, _, continuation) in zip(inputs, requests, strict=True)
    ]
    return asked, sequences
