"""Measure the bits per byte of any model on any texts, in a run or outside."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fuselm.documents import corpus
from fuselm.documents.token_counting import count_read_tokens, measure_sizes
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.command_texts import Named, cut_documents, load_vocabularies, read_rows
from fuselm.results.texts_in_front import TextsInFront, segment_behind
from fuselm.system import part_work, progress
from fuselm.system.part_work import Complete, Fragment

if TYPE_CHECKING:
    from fuselm.results import scoring
    from fuselm.sources.servers.connection import Server

    Scorer = Callable[[Sequence[corpus.Document], Callable[[int], None]], list[scoring.Score]]

BATCH_TOKENS = 1024


def measure_bits_per_byte(
    spec: str,
    texts: Named,
    *,
    dtype: str,
    console: Console,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
) -> dict:
    """Return bits per byte, documents and bytes by domain and on average, and any unspelled share.

    `template` is the chat template of a model without one, as for `load_vocabularies`.
    """
    title = f"evaluate {spec}"
    rows = read_rows(texts, title, console, columns)
    with progress.announce(f"reading {spec}"):
        model = locate_model(spec)
    (vocabulary,) = load_vocabularies(rows, [model], template)
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
) -> "list[scoring.Score]":
    """Compute the bits that a model gives to each document."""
    progress.start(sum(count_read_tokens(vocabulary, documents)), unit="tokens")
    return open_scorer(model, vocabulary, dtype=dtype, batch_tokens=batch_tokens)(documents, progress.advance)


def score_by_parts(
    open_scorer: "Callable[[], Scorer]",
    lengths: Sequence[int],
    documents: Sequence[corpus.Document],
    out: Path,
    *,
    progress: progress.Progress,
) -> "list[scoring.Score] | None":
    """Score documents in windows, together with all processes that do; return None if another one finished.

    A process opens its model at the first window that it scores.
    """
    from fuselm.results import scoring

    windows = part_work.split_windows(measure_sizes(documents), scoring.WINDOW_BYTES)
    score = functools.cache(open_scorer)

    def make_part(number: int) -> Complete:
        found = score()(documents[windows[number]], progress.advance)
        return lambda: {"documents": len(found), "sums": [one.as_row() for one in found]}

    def finish(fragments: list[Fragment]) -> dict:
        pieces = [scoring.Score(**row) for fragment in fragments for row in fragment["sums"]]
        return {"scores": scoring.join_scores(pieces)}

    sizes = [sum(lengths[window]) for window in windows]
    made = part_work.make_parts(out, sizes, make_part, finish, progress=progress, unit="tokens")
    return made and made["scores"]


def open_scorer(
    model: Model,
    vocabulary: Vocabulary,
    *,
    dtype: str,
    batch_tokens: int,
    server: "Server | None" = None,
    front: TextsInFront | None = None,
) -> "Scorer":
    """Return what scores documents and reports the tokens that are done: a model loaded for it, or a server.

    The model reads the texts of `front` in front of documents; a server reads documents by themselves.
    """
    from fuselm.results import scoring

    if server is not None:
        from fuselm.sources.servers import server_capture

        def ask(documents: Sequence[corpus.Document], advance: Callable[[int], None]) -> list[scoring.Score]:
            bits = server_capture.compute_document_bits(server, vocabulary, documents, advance=advance)
            return scoring.sum_pieces(bits, documents, scoring.count_unspelled(vocabulary, documents))

        return ask
    from fuselm.models import probe
    from fuselm.system import machine

    machine.use_free_cores()
    machine.use_own_gpu()
    loaded, layer = probe.load_tried_model(model, dtype=dtype)

    given = {"context_token": model.context_token, "context_length": model.context_length}
    behind = None if front is None else functools.partial(segment_behind, front, vocabulary=vocabulary, **given)

    def score(documents: Sequence[corpus.Document], advance: Callable[[int], None]) -> list[scoring.Score]:
        options = {"batch_tokens": batch_tokens, "advance": advance, "segment": behind}
        return scoring.score_documents(loaded, layer, vocabulary, model.context_token, documents, **options)

    return score
