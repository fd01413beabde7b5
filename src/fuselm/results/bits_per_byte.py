"""Measure the bits per byte of any model on any texts, in a run or outside."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from fuselm.documents import corpus
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.command_texts import Named, cut_documents, load_vocabularies, read_rows
from fuselm.system import progress

if TYPE_CHECKING:
    from fuselm.results import scoring
    from fuselm.sources.servers.connection import Server

BATCH_TOKENS = 1024


def measure_bits_per_byte(
    spec: str, texts: Named, *, dtype: str, console: Console, columns: Mapping[str, str] | None = None
) -> dict:
    """Return bits per byte, documents and bytes by domain and on average, and any unspelled share."""
    title = f"evaluate {spec}"
    rows = read_rows(texts, title, console, columns)
    with progress.announce(f"reading {spec}"):
        model = locate_model(spec)
    (vocabulary,) = load_vocabularies(rows, [model])
    documents = cut_documents(rows, [(model, vocabulary)], title, console)

    with progress.announce("starting torch"):
        from fuselm.results import scoring

    with progress.show_progress(console, title) as shown:
        scores = score_model(model, vocabulary, documents, dtype=dtype, batch_tokens=BATCH_TOKENS, progress=shown)
    values = scoring.compute_bits_per_byte(scores)
    average = values.pop("average")
    unspelled = scoring.compute_unspelled_shares(scores)
    shares = {d: {"unspelled": unspelled.get(d, 0.0)} if unspelled else {} for d in [*values, "average"]}
    return {
        "domains": {
            domain: {
                "bits_per_byte": value,
                **shares[domain],
                "documents": sum(s.domain == domain for s in scores),
                "bytes": sum(s.bytes for s in scores if s.domain == domain),
            }
            for domain, value in values.items()
        },
        "average": {
            "bits_per_byte": average,
            **shares["average"],
            "documents": len(scores),
            "bytes": sum(s.bytes for s in scores),
        },
    }


def score_model(
    model: Model,
    vocabulary: Vocabulary,
    documents: Sequence[corpus.Document],
    *,
    dtype: str,
    batch_tokens: int,
    progress: progress.Progress,
    server: "Server | None" = None,
) -> "list[scoring.Score]":
    """Compute the bits that a model gives to each document: a model loaded for it, or a server's."""
    from fuselm.results import scoring

    progress.start(sum(vocabulary.count_tokens([d.text for d in documents])), unit="tokens")
    if server is not None:
        from fuselm.sources.servers import server_capture

        bits = server_capture.compute_document_bits(server, vocabulary, documents, advance=progress.advance)
        return scoring.sum_pieces(bits, documents, scoring.count_unspelled(vocabulary, documents))
    from fuselm.models import probe
    from fuselm.system import machine

    machine.use_free_cores()
    loaded, layer = probe.load_tried_model(model, dtype=dtype)
    return scoring.score_documents(
        loaded,
        layer,
        vocabulary,
        model.context_token,
        documents,
        batch_tokens=batch_tokens,
        advance=progress.advance,
    )
