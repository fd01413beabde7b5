"""capture.py and server_capture.py: of a conversation, the rows of the responses are captured, and no others."""

from dataclasses import replace
from pathlib import Path

import chat_models
import numpy as np
import pytest
import torch
from captures import source_of
from model_server import NAME, ModelServer
from transformers import AutoModelForCausalLM

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.models.chat.dialogue_reading import add_chat_template
from fuselm.models.chat.messages import Dialogue, Message
from fuselm.models.locating import locate_model
from fuselm.sources import capture
from fuselm.sources.servers import server_capture
from fuselm.sources.servers.connection import connect, find_server
from fuselm.stores.retention import Policy
from fuselm.stores.store import Trace

POLICY = Policy(policy="top_k", top_k=7)
KINDS = [("byte_level", chat_models.LINES), ("sentence_piece", chat_models.BRACKETS)]


@pytest.fixture(scope="module", params=KINDS, ids=["byte_level", "sentence_piece"])
def folder(request, tmp_path_factory) -> Path:
    kind, template = request.param
    return chat_models.add_template(request.getfixturevalue(kind), tmp_path_factory.mktemp("models") / kind, template)


@pytest.fixture(scope="module")
def source(folder) -> capture.LoadedSource:
    source = source_of(folder)
    return replace(source, vocabulary=add_chat_template(locate_model(str(folder)), source.vocabulary))


@pytest.fixture(scope="module")
def documents(texts) -> list[Document]:
    rows = chat_models.make_rows(texts)[:5]
    dialogues = [Dialogue(messages=tuple(Message(**m) for m in row["messages"])) for row in rows]
    return [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain="a", split="train", text=text)
        for n, text in enumerate([*dialogues, "a plain text beside them"])
    ]


def trace(source: capture.LoadedSource, documents: list[Document]) -> list[Trace]:
    read = [source.vocabulary.segment(document.text) for document in documents]
    return list(capture.trace_batch(source, documents, read, policy=POLICY))


def test_rows_are_those_of_the_model_behind_all_that_it_reads(source, folder, documents):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for document, found in zip(documents, trace(source, documents), strict=True):
        read = source.vocabulary.segment(document.text)
        first = source.context_token if read.reading is None else read.reading.first
        ids = torch.tensor([[first, *read.read_ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        kept = np.flatnonzero(read.is_kept)
        expected = logprobs[kept, torch.as_tensor(read.ids).long()].numpy()
        assert found.size == len(document.text.encode())
        assert np.allclose(found.distributions.gold, expected, atol=1e-4)


def test_conversations_are_read_behind_others_of_their_domain(source, folder, documents):
    groups = passages.group_documents(documents)
    assert list(groups.values()) == [[0, 1, 2, 3, 4], [5]]
    read = [source.vocabulary.segment(document.text) for document in documents]
    lengths = [len(of.read_ids) for of in read]
    prefix = passages.fit_prefix(source.vocabulary, source.context_length, max(lengths) + 1)
    planned = passages.plan_batches(slice(0, 6), lengths, groups, prefix=prefix, batch_tokens=99)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    behind = 0
    for batch in planned:
        traces = list(capture.read_passages(source, documents, read, batch, policy=POLICY))
        for passage in (row for row in batch if 5 not in row.documents):
            whole, places = [], {}
            for n in (*passage.before, *passage.documents):
                places[n] = len(whole) + np.flatnonzero(read[n].is_kept)
                whole += [read[n].reading.first, *read[n].read_ids.tolist()]
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            for n in passage.documents:
                expected = logprobs[places[n], torch.as_tensor(read[n].ids).long()].numpy()
                found = next(trace for trace in traces if trace.document == documents[n].id)
                assert np.allclose(found.distributions.gold, expected, atol=1e-4)
                behind += places[n][0] > 0 and n != (*passage.before, *passage.documents)[0]
    assert behind


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_is_asked_with_the_ids_of_the_template(source, folder, documents, kind):
    with ModelServer(kind, source, folder) as server:
        found = find_server(server.url, NAME, str(folder), timeout=20.0)
        read = [source.vocabulary.segment(document.text) for document in documents]
        with connect(found, source.vocabulary, top_k=7) as connection:
            served = [trace for trace, _ in server_capture.trace_documents(connection, documents, read)]
    for own, theirs in zip(trace(source, documents), served, strict=True):
        assert np.array_equal(own.tokens, theirs.tokens)
        assert np.allclose(own.distributions.gold, theirs.distributions.gold, atol=1e-3)


def test_a_server_that_takes_no_ids_is_refused(source, folder, documents):
    with ModelServer("llama", source, folder) as server:
        found = find_server(server.url, NAME, str(folder), context_length=512, timeout=20.0)
        read = [source.vocabulary.segment(documents[0].text)]
        with (
            connect(found, source.vocabulary, top_k=7) as connection,
            pytest.raises(ValueError, match="a conversation must be asked for by token ids"),
        ):
            list(server_capture.trace_documents(connection, documents[:1], read))
