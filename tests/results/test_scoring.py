"""Test bits per byte and bootstrap intervals against the loops in reference.py."""

import math
from collections import Counter

import numpy as np
import pytest
import reference
import torch
from transformers import AutoModelForCausalLM

from fuselm.documents.corpus import Document
from fuselm.models import forward
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import scoring
from fuselm.results.bootstrap import FEWEST_DOCUMENTS, LEVEL, Bootstrap, summarize_scores
from fuselm.results.scoring import Score, compute_bits_per_byte

RESAMPLES = 211


def scores(seed: int = 0, documents: int = 23) -> list[Score]:
    rng = np.random.default_rng(seed)
    return [
        Score(
            document=f"{n:03d}",
            domain=("prose", "code", "maths")[n % 3],
            bits=float(rng.uniform(100, 900)),
            bytes=53 + 13 * n,
        )
        for n in range(documents)
    ]


def columns(of: list[Score]) -> tuple[list[float], list[int], list[str]]:
    return [s.bits for s in of], [s.bytes for s in of], [s.domain for s in of]


def draws_of(bootstrap_seed: int, of: list[Score]) -> list[dict[str, list[int]]]:
    """List the resamples that `Bootstrap` counts, as lists of document numbers."""
    result: list[dict[str, list[int]]] = [{} for _ in range(RESAMPLES)]
    for n, domain in enumerate(sorted({s.domain for s in of})):
        members = [i for i, s in enumerate(of) if s.domain == domain]
        counts = np.random.default_rng([bootstrap_seed, n]).multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=RESAMPLES
        )
        for resample, row in zip(result, counts, strict=True):
            resample[domain] = np.repeat(members, row).tolist()
    return result


def triples(intervals) -> dict[str, tuple[float, float, float]]:
    return {name: (i.value, i.low, i.high) for name, i in intervals.items()}


def assert_same(ours, theirs, rel: float = 1e-10) -> None:
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=rel, abs=1e-12)


@pytest.mark.parametrize("documents", [18, 19, 29])
def test_intervals_are_those_of_the_looped_bootstrap_on_the_same_draws(documents):
    of = scores(documents=documents)
    ours = Bootstrap(of, resamples=RESAMPLES, seed=5).find_intervals(of)
    assert_same(triples(ours), reference.bootstrap(*columns(of), draws=draws_of(5, of)))


def test_paired_intervals_are_those_of_the_looped_bootstrap_of_the_differences():
    one, other = scores(0), scores(1)
    difference = [a.bits - b.bits for a, b in zip(one, other, strict=True)]
    ours = Bootstrap(one, resamples=RESAMPLES, seed=5).find_intervals(one, other)
    assert_same(triples(ours), reference.bootstrap(difference, *columns(one)[1:], draws=draws_of(5, one)))


def test_other_draws_give_nearly_the_same_intervals():
    of = scores(documents=101)
    ours = triples(Bootstrap(of).find_intervals(of))
    theirs = reference.bootstrap(*columns(of), resamples=2000, seed=3)
    for name, (value, low, high) in theirs.items():
        assert ours[name] == pytest.approx((value, low, high), abs=0.1 * (high - low))


def test_a_model_does_not_differ_from_itself():
    of = scores()
    for interval in Bootstrap(of).find_intervals(of, of).values():
        assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_a_constant_difference_per_byte_is_certain():
    one = scores()
    other = [Score(document=s.document, domain=s.domain, bits=s.bits + 0.25 * s.bytes, bytes=s.bytes) for s in one]
    for interval in Bootstrap(one).find_intervals(other, one).values():
        assert (interval.value, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize("documents", [1, 3, 15, 16, 17, 18])
def test_a_domain_of_few_documents_has_no_interval_and_neither_has_an_average_over_it(documents):
    one, other = scores(0, documents=documents), scores(1, documents=documents)
    counts = Counter(s.domain for s in one)
    for intervals in (Bootstrap(one).find_intervals(one), Bootstrap(one).find_intervals(one, other)):
        for domain, interval in intervals.items():
            enough = min(counts.values()) >= 6 if domain == "average" else counts[domain] >= 6
            assert (interval.low is not None, interval.high is not None) == (enough, enough)
        assert intervals["average"].value == pytest.approx(np.mean([intervals[d].value for d in counts]))


def test_fewest_documents_are_those_whose_extent_misses_the_middle_in_at_most_a_twentieth_of_draws():
    missed = {n: 2 * 0.5**n for n in range(1, 20)}  # all on one side of it
    assert min(n for n, share in missed.items() if share <= 1 - LEVEL) == FEWEST_DOCUMENTS


def test_intervals_of_the_fewest_documents_hold_the_truth_far_more_often_than_of_fewer():
    """Draw from a skewed distribution: a percentile interval of few is too narrow, and one of three absurdly so."""
    held, rng = {}, np.random.default_rng(3)
    for documents in (2, 3, 6, 12):
        held[documents] = 0
        for draw in rng.gamma(2.0, size=(300, documents)):
            resampled = rng.choice(draw, size=(199, documents)).mean(axis=1)
            held[documents] += np.quantile(resampled, 0.025) <= 2.0 <= np.quantile(resampled, 0.975)
    assert held[2] < 0.55 * 300 and held[3] < 0.75 * 300 and held[6] > 0.75 * 300 and held[12] > 0.85 * 300


def test_the_order_of_documents_does_not_matter():
    of = scores()
    assert Bootstrap(of).find_intervals(of) == Bootstrap(of[::-1]).find_intervals(of[::-1])


def test_a_domain_is_total_bits_over_total_bytes_and_the_average_the_mean_of_domains():
    of = scores()
    bits, sizes, domains = columns(of)
    members = {d: [i for i, other in enumerate(domains) if other == d] for d in set(domains)}
    values = compute_bits_per_byte(of)
    assert values == pytest.approx(reference.per_domain(bits, sizes, members))
    assert values["average"] == pytest.approx(math.fsum(values[d] for d in members) / len(members))


def test_summary_has_every_model_and_difference():
    of = {"base": scores(0), "clm": scores(1), "fused": scores(2)}
    summary = summarize_scores(of, [("fused", "clm")])
    assert set(summary["models"]) == set(of) and set(summary["differences"]) == {"fused-clm"}
    for row, key in ((summary["models"]["base"], "bits_per_byte"), (summary["differences"]["fused-clm"], "value")):
        assert set(row["domains"]) == {"prose", "code", "maths"}
        for cell in [row["average"], *row["domains"].values()]:
            assert set(cell) == {key, "low", "high"} and cell["low"] <= cell[key] <= cell["high"]
    for domain in ("prose", "code", "maths"):
        fused, clm = (summary["models"][m]["domains"][domain]["bits_per_byte"] for m in ("fused", "clm"))
        assert summary["differences"]["fused-clm"]["domains"][domain]["value"] == pytest.approx(fused - clm)


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece", "word_piece"])
def tiny(request):
    model = locate_model(str(request.getfixturevalue(request.param)))
    loaded = load_model(model, dtype="float32")
    return model, loaded, forward.find_output_layer(loaded), Vocabulary(load_tokenizer(model), model.output_size)


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(id=f"{n}", origin=f"{n}", domain="d", split="heldout", text=t) for n, t in enumerate(texts)]


def test_bits_are_those_of_the_models_dense_softmax(tiny, texts):
    model, loaded, layer, vocabulary = tiny
    documents = documents_of([*(row["text"] for row in texts[::6]), "a"])
    double = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float64).eval()
    ours = scoring.score_documents(loaded, layer, vocabulary, model.context_token, documents, batch_tokens=211)
    for document, score in zip(documents, ours, strict=True):
        ids = vocabulary.segment(document.text).ids.tolist()
        with torch.inference_mode():
            logits = double(torch.tensor([[model.context_token, *ids[:-1]]])).logits[0]
        lacking = vocabulary.segment(document.text).unspelled_bytes
        assert score.unspelled == lacking and ("unspelled" in score.as_row()) == (lacking > 0)
        assert score.bits == pytest.approx(sum(reference.causal_bits(logits, ids)) + 8 * lacking, rel=1e-5)
        assert (score.document, score.bytes) == (document.id, len(document.text.encode()))


@pytest.mark.parametrize("batch_tokens", [1, 211, 100_000])
def test_bits_do_not_depend_on_the_batch(tiny, texts, batch_tokens):
    model, loaded, layer, vocabulary = tiny
    documents = documents_of([row["text"] for row in texts[::6]])
    bits = [
        [
            s.bits
            for s in scoring.score_documents(loaded, layer, vocabulary, model.context_token, documents, batch_tokens=n)
        ]
        for n in (batch_tokens, 977)
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


def test_pieces_of_a_document_are_added_up(tiny, texts):
    model, loaded, layer, vocabulary = tiny
    pieces = [
        Document(id=f"0.{n}", origin="0", domain="d", split="heldout", text=row["text"])
        for n, row in enumerate(texts[:3])
    ]
    (score,) = scoring.score_documents(loaded, layer, vocabulary, model.context_token, pieces)
    apart = scoring.score_documents(
        loaded, layer, vocabulary, model.context_token, documents_of([p.text for p in pieces])
    )
    assert score.document == "0" and score.bytes == sum(s.bytes for s in apart)
    assert score.bits == pytest.approx(sum(s.bits for s in apart), rel=1e-9)


@pytest.mark.parametrize("window_bytes", [1, 997])
def test_documents_are_read_a_window_at_a_time(tiny, texts, window_bytes, monkeypatch):
    model, loaded, layer, vocabulary = tiny
    documents = documents_of([row["text"] for row in texts[::6]])
    whole = scoring.score_documents(loaded, layer, vocabulary, model.context_token, documents)
    monkeypatch.setattr(scoring, "WINDOW_BYTES", window_bytes)
    read = scoring.score_documents(loaded, layer, vocabulary, model.context_token, documents)
    assert [s.document for s in read] == [s.document for s in whole]
    assert [s.bits for s in read] == pytest.approx([s.bits for s in whole], rel=1e-5)


def test_progress_hears_of_every_token(tiny, texts):
    model, loaded, layer, vocabulary = tiny
    documents, heard = documents_of([row["text"] for row in texts[::6]]), []
    scoring.score_documents(
        loaded, layer, vocabulary, model.context_token, documents, batch_tokens=211, advance=heard.append
    )
    assert sum(heard) == sum(vocabulary.count_tokens([d.text for d in documents]))


def test_nan_is_reported_with_its_document(tiny, texts):
    model, _, _, vocabulary = tiny
    broken = load_model(model, dtype="float32")
    with torch.no_grad():
        broken.get_output_embeddings().weight[:] = math.nan
    nan_layer = forward.OutputLayer(weight=broken.get_output_embeddings().weight, bias=None, scale=1.0, soft_cap=None)
    with pytest.raises(ValueError, match=r"^document 0 \(d\): the model gives NaN"):
        scoring.score_documents(broken, nan_layer, vocabulary, model.context_token, documents_of([texts[0]["text"]]))
