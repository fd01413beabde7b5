"""Read the corpus with one source that vLLM runs on this machine's GPUs: prompt log-probabilities become traces.

vLLM gives the most probable entries of each prompt token, and the token's own, under the full softmax at temperature 1.
That is what the policies `threshold` and `top_k` keep. It gives neither whole distributions, which `sampled` draws
from, nor the last hidden states of a generating model. This was written against vLLM's documented interface
(`LLM.generate`, `SamplingParams.prompt_logprobs`) and tested with a stand-in, on no GPU.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, fit_prefix
from fuselm.documents.token_counting import count_read_tokens
from fuselm.models.locating import Model
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.capture import Segmentations
from fuselm.sources.resumable_writing import write_traces
from fuselm.sources.servers.answers import PromptRows, check_row, make_entries, name_token
from fuselm.sources.servers.prompt_logprobs import make_distributions
from fuselm.stores.distributions import Distributions, check_distributions
from fuselm.stores.retention import Policy, drop_unwanted_entries
from fuselm.stores.store import Trace, fingerprint_text
from fuselm.system.errors import name_model_errors
from fuselm.system.progress import Progress

TOKENS_AT_A_TIME = 1 << 14  # in one call; answers are Python objects, some 5 kB a token


def capture_with_vllm(
    model: Model,
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    out: Path,
    *,
    dtype: str,
    policy: Policy,
    prefix_tokens: int = 0,
    batch_tokens: int,
    reader: str | None = None,
    progress: Progress,
) -> dict | None:
    """Capture as `capture.capture_from_model` does, by vLLM, with the entries that the policy wants of its `top_k`.

    A prompt may have one token less than the source's context, because vLLM always writes one. Raises `ValueError` if
    vLLM is not installed, cannot load the model, or a document does not fit.
    """
    segmentations = Segmentations(vocabulary, documents)
    lengths = count_read_tokens(vocabulary, documents, reader=reader)
    _check_lengths(model, documents, lengths)
    engine = _Engine(model, dtype=dtype, top_k=min(policy.top_k, model.output_size))
    separator = passages.tokenize_separator(vocabulary)

    def read_batches(batches: list[list[Passage]]) -> Iterator[list[Trace | None]]:
        segmentations.forget()
        for together in _group(batches, lengths):
            read = [passage for batch in together for passage in batch]
            joined = [passages.join_tokens(passage, segmentations, separator) for passage in read]
            firsts = [_find_first_token(passage, segmentations, model) for passage in read]
            prompts = [[first, *ids.tolist()] for first, (ids, _) in zip(firsts, joined, strict=True)]
            answers = zip(engine.read_prompts(prompts), joined, strict=True)
            for batch in together:
                yield [trace for passage in batch for trace in make_traces(passage, *next(answers))]

    def make_traces(passage: Passage, answer: Any, joined: tuple[np.ndarray, np.ndarray]) -> Iterator[Trace | None]:
        ids, is_own = joined
        own = np.flatnonzero(is_own)
        ends = np.cumsum([len(segmentations[n].ids) for n in passage.documents])[:-1]
        for n, rows in zip(passage.documents, np.split(own, ends), strict=True):
            try:
                found = read_rows(answer, ids.tolist(), rows.tolist(), vocabulary.size, engine.top_k)
            except ValueError as problem:
                where = f"{model.name}: document {documents[n].id} ({documents[n].domain})"
                raise ValueError(f"{where}: {problem}") from None
            yield _make_trace(documents[n], segmentations[n], found, policy, vocabulary.size)

    prefix = fit_prefix(vocabulary, model.context_length - 1, prefix_tokens)
    counts = write_traces(
        read_batches, documents, lengths, out, prefix=prefix, batch_tokens=batch_tokens, progress=progress
    )
    return None if counts is None else counts | {"vocabulary_size": vocabulary.size}


def check_installed() -> None:
    """Raise `ValueError`, which says what to do, unless vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("capture.engine: vllm is not installed; pip install 'fuselm[vllm]', or take another engine")


def read_rows(
    answer: Sequence[Any], ids: Sequence[int], rows: Sequence[int], vocabulary_size: int, top_k: int
) -> Distributions | None:
    """Return the distributions of some tokens of a prompt, from vLLM's log-probabilities; None if the model gives NaN.

    `answer` has None for the prompt's first token, which is not among `ids`, and for each other one a dict from token
    ids to objects with a `logprob`. Raises `ValueError` if that cannot come from one softmax.
    """
    if len(answer) != 1 + len(ids):
        raise ValueError(f"vLLM gives {len(answer)} rows for a prompt of {1 + len(ids)} tokens")
    entries, gold = [], []
    for n in rows:
        token, row = int(ids[n]), answer[1 + n]
        with name_token(n):
            if not row or token not in row:
                raise ValueError("vLLM gives no log-probability of it; a newer vLLM may")
            found = make_entries([int(i) for i in row], [float(entry.logprob) for entry in row.values()])
            logprob = float(row[token].logprob)
            check_row(found, logprob, token, vocabulary_size)
        entries.append(found)
        gold.append(logprob)
    if any(map(math.isnan, gold)):
        return None
    return make_distributions(PromptRows(entries=entries, gold=gold, lost=0.0), top_k)


def _make_trace(
    document: Document, segmentation: Segmentation, found: Distributions | None, policy: Policy, vocabulary_size: int
) -> Trace | None:
    if found is None:
        return None
    distributions = drop_unwanted_entries(policy, found)
    check_distributions(distributions, vocabulary_size)
    return Trace(
        document=document.id,
        text=fingerprint_text(document.text),
        size=segmentation.size,
        nats=-math.fsum(distributions.gold.tolist()),
        tokens=segmentation.ids,
        starts=segmentation.starts,
        distributions=distributions,
        weights=np.zeros((len(segmentation.ids), 0), np.float32),
    )


def _find_first_token(passage: Passage, segmentations: Sequence[Segmentation], model: Model) -> int:
    """Return the token in front of a prompt: the one with which a conversation begins, or the context token."""
    reading = segmentations[(*passage.before, *passage.documents)[0]].reading
    return model.context_token if reading is None else int(reading.first)


def _group(batches: Sequence[list[Passage]], lengths: Sequence[int]) -> Iterator[list[list[Passage]]]:
    """Yield batches that are read in one call, with about `TOKENS_AT_A_TIME` tokens of their own."""
    group: list[list[Passage]] = []
    tokens = 0
    for batch in batches:
        group.append(batch)
        tokens += sum(lengths[n] for n in passages.list_documents(batch))
        if tokens >= TOKENS_AT_A_TIME:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _check_lengths(model: Model, documents: Sequence[Document], lengths: Sequence[int]) -> None:
    for document, length in zip(documents, lengths, strict=True):
        if 1 + length >= model.context_length:
            raise ValueError(
                f"{model.name}: document {document.id} ({document.domain}) has {length} tokens, and vLLM reads at most "
                f"{model.context_length - 2} of this model; set corpus.max_bytes, or take another engine"
            )


class _Engine:
    """Hold the model in vLLM, on as many of the visible GPUs as a power of two has."""

    def __init__(self, model: Model, *, dtype: str, top_k: int):
        check_installed()
        import torch
        import vllm

        self.top_k, self._model, self._vllm = top_k, model, vllm
        with name_model_errors(model.name, "loading it into vLLM"):
            self._llm = vllm.LLM(
                model=str(model.folder),
                skip_tokenizer_init=True,  # prompts are token ids
                dtype=dtype,
                max_model_len=model.context_length,
                max_logprobs=top_k,
                logprobs_mode="raw_logprobs",
                enable_prefix_caching=False,  # rows of cached prompts are not given
                tensor_parallel_size=1 << max(torch.cuda.device_count(), 1).bit_length() - 1,
                seed=0,
            )

    def read_prompts(self, prompts: Sequence[list[int]]) -> Iterator[Sequence[Any]]:
        """Yield the log-probabilities of each prompt's tokens, in order."""
        asked = self._vllm.SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=self.top_k, detokenize=False, ignore_eos=True
        )
        given = [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        with name_model_errors(self._model.name, "reading prompts in vLLM"):
            answers = self._llm.generate(given, asked, use_tqdm=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            if list(answer.prompt_token_ids) != prompt:
                raise ValueError(f"{self._model.name}: vLLM answered about another prompt; a newer vLLM may not")
            yield answer.prompt_logprobs
