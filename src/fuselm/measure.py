"""Measurements of any model on any texts, outside a run: bits per byte, and the fidelity of an alignment."""

from pathlib import Path

from rich.console import Console

from fuselm import corpus, progress
from fuselm.models import Model, load_tokenizer, locate
from fuselm.vocabulary import Vocabulary

METHODS = ("span", "mined", "exact", "cooccurrence", "statistics")
BATCH_TOKENS = 4096


def bits_per_byte(spec: str, texts: Path, *, dtype: str, console: Console) -> dict:
    """By domain and on average: bits per byte, documents, bytes."""
    rows = _rows(texts)
    model = locate(spec)
    vocabulary = Vocabulary(load_tokenizer(model), model.output_size)
    documents = _documents(rows, [(model, vocabulary)])

    from fuselm import evaluation, forward
    from fuselm.models import load_model

    loaded = load_model(model, dtype=dtype)
    with progress.show(console, f"evaluate {spec}") as shown:
        shown.start(sum(vocabulary.count_tokens([d.text for d in documents])), unit="tokens")
        scores = evaluation.score(
            loaded,
            forward.output_layer(loaded),
            vocabulary,
            model.context_token,
            documents,
            batch_tokens=BATCH_TOKENS,
            advance=shown.advance,
        )
    values = evaluation.bits_per_byte(scores)
    average = values.pop("average")
    return {
        "domains": {
            domain: {
                "bits_per_byte": value,
                "documents": sum(s.domain == domain for s in scores),
                "bytes": sum(s.bytes for s in scores if s.domain == domain),
            }
            for domain, value in values.items()
        },
        "average": {"bits_per_byte": average, "documents": len(scores), "bytes": sum(s.bytes for s in scores)},
    }


def fidelity(
    source_spec: str, target_spec: str, texts: Path, *, method: str, top_k: int, dtype: str, console: Console
) -> dict:
    """By domain and on average: `fuselm.fidelity.Fidelity.summary` of one source for one target."""
    if method not in METHODS:
        raise ValueError(f"--method {method}: unknown; take one of {', '.join(METHODS)}")
    rows = _rows(texts)
    source, target = locate(source_spec), locate(target_spec)
    source_vocabulary = Vocabulary(load_tokenizer(source), source.output_size)
    target_vocabulary = Vocabulary(load_tokenizer(target), target.output_size)
    documents = _documents(rows, [(source, source_vocabulary), (target, target_vocabulary)])

    from fuselm import capture, fidelity, forward
    from fuselm.alignment import Aligner
    from fuselm.models import load_model

    loaded = load_model(source, dtype=dtype)
    reader = capture.Source(
        model=loaded,
        layer=forward.output_layer(loaded),
        vocabulary=source_vocabulary,
        context_token=source.context_token,
    )
    aligner = Aligner(
        source_vocabulary, target_vocabulary, method=method, top_k=top_k, texts=[d.text for d in documents]
    )
    segmentations = [source_vocabulary.segment(d.text) for d in documents]
    of = {d.id: d for d in documents}
    triples = []
    with progress.show(console, f"fidelity {source_spec}") as shown:
        shown.start(sum(len(s.ids) for s in segmentations), unit="tokens")
        for batch in forward.batches([len(s.ids) for s in segmentations], BATCH_TOKENS):
            chosen = [documents[i] for i in batch], [segmentations[i] for i in batch]
            for trace in capture.trace_batch(reader, *chosen, top_k=top_k):
                document = of[trace.document]
                triples.append((document.domain, trace, aligner.align(trace, document.text)))
                shown.advance(len(trace.tokens))
    everything = fidelity.by_domain(("average", s, a) for _, s, a in triples)
    return {"domains": fidelity.by_domain(triples), **everything}


def _rows(texts: Path) -> list[tuple[str, str]]:
    rows = [(domain, text) for domain, text in corpus.read_texts(texts) if text]
    if not rows:
        raise ValueError(f"{texts}: no text in it; each line needs a 'text' that is not empty")
    return rows


def _documents(rows: list[tuple[str, str]], models: list[tuple[Model, Vocabulary]]) -> list[corpus.Document]:
    """The texts, cut where a model's context demands it."""
    whole = (
        corpus.Document(id=f"{n:06d}", origin=f"{n:06d}", domain=domain, split="heldout", text=text)
        for n, (domain, text) in enumerate(rows)
    )
    readers = [corpus.Reader(name=m.name, vocabulary=v, max_tokens=m.context_length) for m, v in models]
    return list(corpus.cut_to_fit(whole, readers))
