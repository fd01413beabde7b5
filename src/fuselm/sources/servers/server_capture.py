"""Read the corpus through one server: its prompt log-probabilities become traces, several documents at a time."""

import math
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from fuselm.documents.corpus import Document
from fuselm.documents.passages import Passage, Prefix, list_documents
from fuselm.documents.token_counting import count_read_tokens
from fuselm.models.vocabulary import Segmentation, Vocabulary
from fuselm.sources.servers import client, prompt_logprobs
from fuselm.sources.servers.client import Client, Unreachable
from fuselm.sources.servers.connection import Connection, Server, ask_about_prompt, connect, read_rows
from fuselm.sources.servers.prompt_logprobs import Dialect, Prompt, PromptRows
from fuselm.stores.distributions import check_distributions
from fuselm.stores.retention import Policy
from fuselm.stores.store import Trace, fingerprint_text
from fuselm.system.progress import Progress

DOCUMENTS_PER_BATCH = 1  # document a batch: the server makes its own


def capture_from_server(
    server: Server,
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    out: Path,
    *,
    policy: Policy,
    reader: str | None = None,
    progress: Progress,
) -> dict | None:
    """Capture as `capture_from_model` does, from a server; keep the entries that the policy wants of its `top_k`.

    In the counts, `unclear` is the mean mass of a token's strings that may be several tokens.
    """
    from fuselm.sources.resumable_writing import write_traces
    from fuselm.stores import retention

    sums = Counter[str]()

    def take_sums() -> dict[str, float]:
        taken = dict(sums)
        sums.clear()
        return taken

    with connect(server, vocabulary, top_k=policy.top_k) as connection:

        def read_batches(batches: list[list[Passage]]) -> Iterator[list[Trace | None]]:
            todo = [i for batch in batches for i in list_documents(batch)]
            asked = [documents[i] for i in todo]
            segmentations = [vocabulary.segment(d.text) for d in asked]
            for trace, unclear in trace_documents(connection, asked, segmentations):
                if trace is None:
                    yield [None]
                    continue
                sums.update({"unclear": unclear, "asked_tokens": len(trace.tokens)})
                yield [replace(trace, distributions=retention.drop_unwanted_entries(policy, trace.distributions))]

        lengths = count_read_tokens(vocabulary, documents, reader=reader)
        counts = write_traces(
            read_batches,
            documents,
            lengths,
            out,
            prefix=Prefix(),
            batch_tokens=DOCUMENTS_PER_BATCH,
            progress=progress,
            take_sums=take_sums,
        )
    if counts is None:
        return None
    unclear = counts.pop("unclear", 0.0) / max(counts.pop("asked_tokens", 0), 1)
    return counts | {"api": connection.api, "unclear": unclear, "vocabulary_size": vocabulary.size}


def compute_document_bits(
    server: Server, vocabulary: Vocabulary, documents: Sequence[Document], *, advance: Callable[[int], None]
) -> dict[str, float]:
    """Compute bits as `scoring.compute_document_bits` does, from a server; report tokens done to `advance`."""
    result = {}
    with connect(server, vocabulary, top_k=1) as connection:
        found = trace_documents(connection, documents, [vocabulary.segment(d.text) for d in documents])
        for document, (trace, _) in zip(documents, found, strict=True):
            if trace is None:
                raise ValueError(f"{server.url}: document {document.id} ({document.domain}): gives NaN; leave it out")
            result[trace.document] = trace.nats / math.log(2)
            advance(len(vocabulary.segment(document.text).read_ids))
    return result


def trace_documents(
    connection: Connection, documents: Sequence[Document], segmentations: Sequence[Segmentation]
) -> Iterator[tuple[Trace | None, float]]:
    """Yield each document's trace in order, with the mass that its rows lost to ambiguous strings.

    A trace is None where the server gives NaN; a string is ambiguous if it may be several tokens. Several documents are
    asked for at a time. Raises `ValueError`, with the document, where the server gives anything but distributions, and
    `Unreachable` where it gives nothing.
    """

    def trace(n: int) -> tuple[Trace | None, float]:
        try:
            return _trace_document(connection, documents[n], segmentations[n])
        except Unreachable:
            raise
        except ValueError as problem:
            text = client.quote_server(connection.client, str(problem).removeprefix(f"{connection.server.url}: "), 1000)
            raise ValueError(
                f"{connection.server.url}: document {documents[n].id} ({documents[n].domain}): {text}"
            ) from None

    return _compute_in_order(trace, len(documents), connection.server.requests, connection.client)


def _trace_document(
    connection: Connection, document: Document, segmentation: Segmentation
) -> tuple[Trace | None, float]:
    prompt = _make_prompt(connection, document, segmentation)
    rows = read_rows(connection, prompt, ask_about_prompt(connection, prompt), top_k=connection.top_k)
    if rows.entries and rows.entries[0] is None:
        if connection.opening is None:
            raise ValueError("token 0 has no log-probabilities in the answer")
        rows = _add_first_row(connection, rows, prompt.ids[0])
        prompt_logprobs.check_rows(connection.api, rows, prompt, connection.vocabulary.size)
    if segmentation.reading is not None:
        rows = _keep_rows(rows, segmentation.reading.kept)
    distributions = prompt_logprobs.make_distributions(rows, connection.top_k)
    if np.isnan(distributions.gold).any() or np.isnan(distributions.logprobs).any():
        return None, 0.0
    check_distributions(distributions, connection.vocabulary.size)
    trace = Trace(
        document=document.id,
        text=fingerprint_text(document.text),
        size=segmentation.size,
        nats=-math.fsum(distributions.gold.tolist()),
        tokens=segmentation.ids,
        starts=segmentation.starts,
        distributions=distributions,
        weights=np.zeros((len(segmentation.ids), 0), np.float32),
    )
    return trace, rows.lost


def _make_prompt(connection: Connection, document: Document, segmentation: Segmentation) -> Prompt:
    """Return what is asked about a document; of a conversation, all tokens that the model reads."""
    if segmentation.reading is not None:
        if connection.api == "openai":
            raise ValueError(
                "a conversation must be asked for by token ids, which this server does not take; serve the model by "
                "vLLM or SGLang, or load it here"
            )
        return Prompt(text="", ids=segmentation.reading.ids.tolist(), context=segmentation.reading.first)
    assert isinstance(document.text, str)
    return Prompt(text=document.text, ids=segmentation.ids.tolist(), context=connection.server.model.context_token)


def _keep_rows(rows: PromptRows, kept: Bool[np.ndarray, "read"]) -> PromptRows:
    """Return the rows of a conversation's responses."""
    chosen = np.flatnonzero(kept).tolist()
    return replace(rows, entries=[rows.entries[n] for n in chosen], gold=[rows.gold[n] for n in chosen])


def _add_first_row(connection: Connection, rows: PromptRows, token: int) -> PromptRows:
    """Add the first row, which the echo leaves out."""
    opening, dialect = connection.opening, connection.dialect
    assert opening is not None and dialect is not None
    if token not in opening.gold:
        among = dict(opening.entries)
        opening.gold[token] = among[token] if token in among else _force_first_token(connection, dialect, token)
    return replace(
        rows,
        entries=[opening.entries, *rows.entries[1:]],
        gold=[opening.gold[token], *rows.gold[1:]],
        lost=rows.lost + opening.lost,
    )


def _force_first_token(connection: Connection, dialect: Dialect, token: int) -> float:
    """Return a first token's log-probability.

    A bias makes the server choose the token, and the answer says what its log-probability was before.
    """
    body = prompt_logprobs.request_next_token(connection.server.served, dialect.opening, 1)
    answer = client.ask(connection.client, "completions", body | {"temperature": 0, "logit_bias": {str(token): 100}})
    string, logprob = prompt_logprobs.read_chosen_token(answer)
    if string != dialect.strings[token]:
        raise ValueError(f"the first token's log-probability cannot be obtained (asked for {dialect.strings[token]!r})")
    return logprob


def _compute_in_order(do: Callable[[int], Any], count: int, workers: int, asked: Client) -> Iterator[Any]:
    """Yield `do(0)`, `do(1)` and so on, in order, computing several at a time.

    The threads don't keep the process from ending.
    """
    tasks: queue.SimpleQueue[tuple[int, Future] | None] = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            n, future = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(do(n))
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(workers, count)):
        threading.Thread(target=work, daemon=True).start()
    waiting: deque[Future] = deque()
    begun = 0
    try:
        while begun < count or waiting:
            while begun < count and len(waiting) < 2 * workers:
                waiting.append(Future())
                tasks.put((begun, waiting[-1]))
                begun += 1
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in range(workers):
            tasks.put(None)
        if waiting:
            asked.stop.set()
