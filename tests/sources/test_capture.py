"""capture.py against the model's dense softmax in float64; and interrupted, then run again."""

import io
import math
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captures import KINDS, PREFIX, TOP_K, Interrupted, captured, documents, source, source_of  # noqa: F401
from transformers import AutoModelForCausalLM

from fuselm.documents import passages
from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.sources import capture, resumable_writing
from fuselm.stores import store
from fuselm.stores.retention import Policy
from fuselm.stores.store import Trace


def traces(source: capture.LoadedSource, documents: list[Document], *, top_k: int = TOP_K) -> list[Trace]:
    segmentations = [source.vocabulary.segment(d.text) for d in documents]
    return list(capture.trace_batch(source, documents, segmentations, policy=Policy(policy="top_k", top_k=top_k)))


def dense(source: capture.LoadedSource, tokens: np.ndarray) -> np.ndarray:
    """Return log-probabilities of every token's full distribution, by the model in float64."""
    double = AutoModelForCausalLM.from_config(source.model.config, dtype=torch.float64).eval()
    double.load_state_dict({name: w.double() for name, w in source.model.state_dict().items()})
    inputs = torch.tensor([[source.context_token, *tokens.tolist()[:-1]]])
    with torch.inference_mode():
        return torch.log_softmax(double(inputs).logits[0], dim=-1).numpy()


@pytest.mark.parametrize("top_k", [1, TOP_K, 10_007])
def test_rows_are_those_of_the_dense_softmax(source, documents, top_k):
    for document, trace in zip(documents, traces(source, documents, top_k=top_k), strict=True):
        expected, d = dense(source, trace.tokens), trace.distributions
        count = min(top_k, source.vocabulary.size)
        assert trace.tokens.tolist() == source.vocabulary.segment(document.text).ids.tolist()
        assert d.counts.tolist() == [count] * len(trace.tokens)
        for i, row in enumerate(expected):
            ids, logprobs = d.row(i)
            assert len(set(ids.tolist())) == count
            np.testing.assert_allclose(logprobs, row[ids], atol=2e-4)
            np.testing.assert_allclose(logprobs, np.sort(row)[::-1][:count], atol=2e-4)
            assert d.tail[i] == pytest.approx(1 - math.fsum(np.exp(row[ids])), abs=2e-5)
            assert d.gold[i] == pytest.approx(row[trace.tokens[i]], abs=2e-4)
        assert trace.nats == pytest.approx(-math.fsum(d.gold.tolist()), rel=1e-6)
        assert trace.size == len(document.text.encode())


def test_the_first_token_is_predicted_from_the_context_token(source, documents):
    (trace,) = traces(source, documents[:1])
    with torch.inference_mode():
        logits = source.model(torch.tensor([[source.context_token]])).logits[0, 0]
    ids, logprobs = trace.distributions.row(0)
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    np.testing.assert_allclose(logprobs, expected[ids], atol=2e-4)


def test_a_document_does_not_depend_on_those_read_with_it(source, documents):
    for document, together in zip(documents, traces(source, documents), strict=True):
        (alone,) = traces(source, [document])
        np.testing.assert_allclose(together.distributions.gold, alone.distributions.gold, atol=2e-4)


def test_rows_do_not_depend_on_the_size_of_a_chunk(source, documents, monkeypatch):
    whole = traces(source, documents)
    monkeypatch.setattr(forward, "LOGITS_PER_CHUNK", 13 * source.vocabulary.size)
    for a, b in zip(whole, traces(source, documents), strict=True):
        np.testing.assert_allclose(a.distributions.gold, b.distributions.gold, atol=1e-5)


def test_nan_is_reported_with_its_document(byte_level, documents):
    source = source_of(byte_level)
    with torch.no_grad():
        source.model.model.layers[0].mlp.up_proj.weight[:] = math.nan
    with pytest.raises(
        ValueError, match=r"^document 000001 \(.*\): the model gives NaN; leave the document or the model"
    ):
        traces(source, documents[1:2])


def poisoned(folder, documents: list[Document]) -> tuple[capture.LoadedSource, list[str]]:
    """Return a source that gives NaN for every text with its rarest token, and the documents that have it."""
    source = source_of(folder)
    ids = [source.vocabulary.segment(d.text).ids[:-1].tolist() for d in documents]
    (token,) = [t for t in {t for row in ids for t in row} if sum(t in row for row in ids) == 1][:1]
    with torch.no_grad():
        source.model.get_input_embeddings().weight[token] = math.nan
    return source, [d.id for d, row in zip(documents, ids, strict=True) if token in row]


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_document_with_nan_is_named_skipped_and_counted(tmp_path, byte_level, documents, monkeypatch, stop_after):
    monkeypatch.setattr(resumable_writing, "MOST_SKIPPED", 0.1)
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)
    source, bad = poisoned(byte_level, documents)
    if stop_after is not None:
        with pytest.raises(Interrupted):
            captured(tmp_path / "store", source, documents, stop_after=stop_after)
    shown = io.StringIO()
    counts = captured(tmp_path / "store", source, documents, shown=shown)["counts"]
    assert counts["skipped"] == bad and f"skipped document {bad[0]} (" in shown.getvalue()
    found = store.Store(tmp_path / "store")
    assert found.documents == [d.id for d in documents if d.id not in bad]
    found.require_inputs({}, documents, where="here")


def test_too_many_documents_with_nan_stop_the_capture(tmp_path, byte_level, documents):
    source, bad = poisoned(byte_level, documents)
    message = (
        rf"^capture: the model gives NaN for 1 of {len(documents)} documents \(first: document {bad[0]} \(.*\)\), more "
        "than 1%; try another dtype or capture.prefix_tokens=0, or leave the model out$"
    )
    with pytest.raises(ValueError, match=message):
        captured(tmp_path / "store", source, documents)


@pytest.mark.parametrize("policy", [{}, {"policy": "sampled", "draws": 11}])
@pytest.mark.parametrize(("stop_after", "window"), [(0, 1 << 17), (1, 1 << 17), (3, 1 << 17), (3, 211), (4, 211)])
def test_an_interrupted_capture_resumes_and_ends_the_same(
    tmp_path, byte_level, documents, monkeypatch, stop_after, window, policy
):
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)
    monkeypatch.setattr(resumable_writing, "WINDOW_TOKENS", window)
    monkeypatch.setattr(resumable_writing, "WINDOW_BATCHES", 0)
    source = source_of(byte_level)
    captured(tmp_path / "whole", source, documents, **policy)
    with pytest.raises(Interrupted):
        captured(tmp_path / "cut", source, documents, stop_after=stop_after, **policy)
    before = list((tmp_path / "cut.partial").glob("part-*")) + list((tmp_path / "cut.partial").glob(".block-*.parquet"))
    there = sum(pq.read_metadata(p).num_rows for p in before)
    counts = captured(tmp_path / "cut", source, documents, **policy)["counts"]
    assert counts["resumed_documents"] == there
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == files
    for name in set(files) - {"manifest.json"}:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert store.Store(tmp_path / "cut").documents == [d.id for d in documents]


def test_a_damaged_block_is_read_again(tmp_path, byte_level, documents, monkeypatch):
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)
    source = source_of(byte_level)
    captured(tmp_path / "whole", source, documents)
    with pytest.raises(Interrupted):
        captured(tmp_path / "cut", source, documents, stop_after=2)
    block = sorted((tmp_path / "cut.partial").glob(".block-*.parquet"))[0]
    block.write_bytes(block.read_bytes()[:-7])
    captured(tmp_path / "cut", source, documents)
    part = store.part_path(tmp_path / "whole", 0).name
    assert (tmp_path / "cut" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


def test_no_documents_make_an_empty_store(tmp_path, byte_level):
    counts = captured(tmp_path / "none", source_of(byte_level), [])["counts"]
    assert (counts["documents"], counts["tokens"]) == (0, 0) and len(store.Store(tmp_path / "none")) == 0


def by_domain(documents: list[Document]) -> list[Document]:
    """Return documents of two domains that alternate."""
    return [replace(d, domain=("even", "odd")[n % 2]) for n, d in enumerate(documents)]


def test_rows_are_those_of_a_document_behind_the_ones_before_it(tmp_path, source, documents):
    documents = by_domain(documents)
    captured(tmp_path / "store", source, documents, policy="top_k", top_k=10_007)
    found = store.Store(tmp_path / "store")
    between = passages.tokenize_separator(source.vocabulary)
    ids = {d.id: source.vocabulary.segment(d.text).ids for d in documents}
    plan = passages.plan_batches(
        slice(0, len(documents)),
        [len(ids[d.id]) for d in documents],
        passages.group_documents(documents),
        prefix=passages.fit_prefix(source.vocabulary, source.context_length, PREFIX),
        batch_tokens=509,
    )
    behind = 0
    for row in (row for batch in plan for row in batch):
        front = [i for n in row.before for i in (*ids[documents[n].id], *between)][-row.prefix :] if row.prefix else []
        for n in row.documents:
            trace = found.read(documents[n].id)
            rows = dense(source, np.array([*front, *trace.tokens], np.int64))[len(front) :]
            np.testing.assert_allclose(trace.distributions.gold, rows[range(len(rows)), trace.tokens], atol=5e-3)
            behind += len(front) > 0
            front = [*front, *trace.tokens, *between]
    assert behind == len(documents)


def test_a_document_behind_one_with_nan_is_read_by_itself(tmp_path, byte_level, documents, monkeypatch):
    monkeypatch.setattr(resumable_writing, "MOST_SKIPPED", 0.1)
    documents = [replace(d, domain="one") for d in documents]
    source, bad = poisoned(byte_level, documents)
    counts = captured(tmp_path / "store", source, documents)["counts"]
    assert counts["skipped"] == bad and len(store.Store(tmp_path / "store")) == len(documents) - 1


def test_documents_that_have_nan_behind_others_alone_are_skipped(tmp_path, byte_level, documents, monkeypatch):
    """Stop the capture too, if there are too many of them."""
    source, hidden_states = source_of(byte_level), forward.compute_hidden_states

    def overflowing(model, layer, inputs, mask):
        found = hidden_states(model, layer, inputs, mask)
        found[:, 200:] = math.nan
        return found

    monkeypatch.setattr(forward, "compute_hidden_states", overflowing)
    short = [replace(d, domain="one") for d in documents if len(source.vocabulary.segment(d.text).ids) <= 200]
    with pytest.raises(ValueError, match=r"the model gives NaN for [1-9] of .* or capture.prefix_tokens=0, or leave"):
        captured(tmp_path / "store", source, short)
    monkeypatch.setattr(resumable_writing, "MOST_SKIPPED", 1)
    skipped = captured(tmp_path / "store", source, short)["counts"]["skipped"]
    assert skipped and {*skipped, *store.Store(tmp_path / "store").documents} == {d.id for d in short}


def test_a_source_reads_in_the_thread_that_asks(tmp_path, byte_level, documents, monkeypatch):
    """Read in the calling thread, while another one writes."""
    read, threads = capture.read_batch, set()

    def spied(*arguments, **options):
        threads.add(threading.current_thread())
        return read(*arguments, **options)

    monkeypatch.setattr(capture, "read_batch", spied)
    captured(tmp_path / "store", source_of(byte_level), documents)
    assert threads == {threading.main_thread()}
