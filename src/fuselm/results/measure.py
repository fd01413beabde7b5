"""Measurements of any model on any texts, outside a run: bits per byte, and the fidelity of an alignment."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fuselm.documents import corpus, text_files, texts
from fuselm.documents.cutting import Reader
from fuselm.models.model import Model, load_vocabulary, locate
from fuselm.models.vocabulary import Vocabulary
from fuselm.system import manifest, progress
from fuselm.system.terminal import plain

if TYPE_CHECKING:
    from fuselm.results import evaluation
    from fuselm.sources.servers import server as servers

METHODS = ("span", "mined", "exact", "cooccurrence", "statistics")
BATCH_TOKENS = 1024


def bits_per_byte(spec: str, texts: str | Path, *, dtype: str, console: Console) -> dict:
    """Return by domain and on average: bits per byte, documents, bytes; and the share that is not spelled, if any."""
    title = f"evaluate {spec}"
    rows = _rows(texts, title, console)
    with progress.doing(f"reading {spec}"):
        model = locate(spec)
    vocabulary = load_vocabulary(model)
    documents = _documents(rows, [(model, vocabulary)], title, console)

    with progress.doing("starting torch"):
        from fuselm.results import evaluation

    with progress.show(console, title) as shown:
        scores = score(model, vocabulary, documents, dtype=dtype, batch_tokens=BATCH_TOKENS, progress=shown)
    values = evaluation.bits_per_byte(scores)
    average = values.pop("average")
    unspelled = evaluation.unspelled_shares(scores)
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


def score(
    model: Model,
    vocabulary: Vocabulary,
    documents: Sequence[corpus.Document],
    *,
    dtype: str,
    batch_tokens: int,
    progress: progress.Progress,
    server: "servers.Server | None" = None,
) -> "list[evaluation.Score]":
    """The bits that a model gives to each document: one that is loaded for it, or a server's."""
    from fuselm.results import evaluation

    progress.start(sum(vocabulary.count_tokens([d.text for d in documents])), unit="tokens")
    if server is not None:
        from fuselm.sources.servers import remote

        bits = remote.document_bits(server, vocabulary, documents, advance=progress.advance)
        return evaluation.totals(bits, documents, evaluation.count_unspelled(vocabulary, documents))
    from fuselm.models import probe
    from fuselm.system import machine

    machine.use_free_cores()
    loaded, layer = probe.load(model, dtype=dtype)
    return evaluation.score(
        loaded,
        layer,
        vocabulary,
        model.context_token,
        documents,
        batch_tokens=batch_tokens,
        advance=progress.advance,
    )


def fidelity(
    source_spec: str,
    target_spec: str,
    texts: str | Path,
    *,
    methods: Sequence[str],
    top_k: int,
    dtype: str,
    console: Console,
    report: Path | None = None,
) -> dict:
    """How much of one source survives alignment to one target's tokens, by each method; and a page of it.

    `domains` and `average` are `fidelity.Fidelity.summary`; `spans`, `categories`, `causes`, `informed` and `unspelled`
    (shares of bytes, if any) are of spans.py, `candidates_spelled` is of candidates.py; `verdict` judges by `informed`
    and `candidates_spelled`. All are the first method's; of several, `methods` has each one's.
    """
    methods = list(dict.fromkeys(methods))
    _check_methods(methods)
    if report is not None:
        check_report(report)
    title = f"fidelity {source_spec}"
    rows = _rows(texts, title, console)
    with progress.doing(f"reading {source_spec} and {target_spec}"):
        source, target = locate(source_spec), locate(target_spec)
    vocabularies = tuple(load_vocabulary(model) for model in (source, target))
    documents = _documents(rows, list(zip((source, target), vocabularies, strict=True)), title, console)

    with progress.doing("starting torch"):
        from fuselm.alignment import spans
        from fuselm.alignment.aligner import Aligner
        from fuselm.alignment.candidates import Candidates
        from fuselm.alignment.fidelity import Fidelity
        from fuselm.models import forward
        from fuselm.results.report import finite
        from fuselm.sources import capture
        from fuselm.stores import retention

    reader = capture.load(source, vocabularies[0], dtype=dtype)
    policy = retention.Policy(policy="top_k", top_k=top_k)
    read = [d.text for d in documents]
    aligners = {method: Aligner(*vocabularies, method=method, top_k=top_k, texts=read) for method in methods}
    domains = sorted({d.domain for d in documents})
    averages = {method: Fidelity() for method in methods}
    sums = {method: {domain: Fidelity() for domain in domains} for method in methods}
    outcomes: dict[str, list[spans.Outcome]] = {method: [] for method in methods}
    cuts: list[spans.Spans] = []
    candidates = Candidates()
    segmentations = [vocabularies[0].segment(d.text) for d in documents]
    of = {d.id: d for d in documents}
    with progress.show(console, title) as shown:
        shown.start(sum(len(s.ids) for s in segmentations), unit="tokens")
        for batch in forward.batches([len(s.ids) for s in segmentations], BATCH_TOKENS):
            chosen = [documents[i] for i in batch], [segmentations[i] for i in batch]
            for trace in capture.trace_batch(reader, *chosen, policy=policy):
                document = of[trace.document]
                candidates.add(vocabularies[0], trace)
                for number, (method, aligner) in enumerate(aligners.items()):
                    aligned = aligner.align(trace, document.text)
                    for of_texts in (sums[method][document.domain], averages[method]):
                        of_texts.add(trace, aligned, aligner.count_unspelled(trace, document.text))
                    if number == 0:
                        cuts.append(spans.cut(trace, aligned, document.text, vocabularies))
                    mass = spans.mass_lost(aligner, method, cuts[-1], trace, aligned)
                    outcomes[method].append(spans.judge(cuts[-1], aligned, mass))
                shown.advance(len(trace.tokens))
    results = {m: finite(_fidelity_of(sums[m], averages[m], cuts, outcomes[m], candidates.share)) for m in methods}
    if report is not None:
        from fuselm.results.pages import fidelity_page

        page = fidelity_page.page(
            results, cuts, outcomes, vocabularies, source=source_spec, target=target_spec, top_k=top_k
        )
        manifest.write_text(report, page)
    return results[methods[0]] | ({"methods": results} if len(methods) > 1 else {})


def _fidelity_of(domains: dict, average, cuts: list, outcomes: list, candidates_spelled: float) -> dict:
    from fuselm.alignment import fidelity, spans

    informed = spans.informed(cuts, outcomes)
    unspelled = spans.unspelled_shares(cuts)
    filled = {"unspelled": 0.0} if average.unspelled else {}
    return {
        "domains": {domain: sums.summary() | filled | sums.summary() for domain, sums in domains.items()},
        "average": average.summary(),
        "verdict": fidelity.verdict(informed["own_bits"], informed["fidelity"], candidates_spelled),
        "informed": informed,
        "candidates_spelled": candidates_spelled,
        **({"unspelled": unspelled} if unspelled else {}),
        "spans": spans.by_kind(cuts),
        "categories": spans.by_category(cuts, outcomes),
        "causes": spans.by_cause(cuts, outcomes),
    }


def _check_methods(methods: Sequence[str]) -> None:
    for method in methods:
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"--method {method}: unknown; take one of {', '.join(METHODS)}{hint}")


def check_report(path: Path) -> None:
    """Raises `ValueError` if no page can or should be written there."""
    if not path.parent.is_dir():
        raise ValueError(f"--report {path}: no folder {path.parent}; make it, or name a file in another")
    if path.is_dir():
        raise ValueError(f"--report {path}: a folder; name a file, such as {path / 'page.html'}")
    if path.exists() and path.suffix not in (".html", ".htm"):
        raise ValueError(f"--report {path}: there already, and no HTML page; name another file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--report {path}: cannot write in {path.parent}; name a file elsewhere")


def _rows(named: str | Path, title: str, console: Console) -> list[texts.Row]:
    """Read the texts that `named` stands for: a file, a folder or a pattern."""
    files = text_files.find_files([named])
    rows: list[texts.Row] = []
    with console.status(plain(f"{title}: reading texts")):
        domains = text_files.name_domains(files, lambda file: {row.domain for row in texts.read_texts(file)})
        for file, domain in zip(files, domains, strict=True):
            rows += [row for row in texts.read_texts(file, domain) if row.text]
    if not rows:
        raise ValueError(f"{named}: no text in it; each line needs a 'text' that is not empty")
    if "average" in {row.domain for row in rows}:
        raise ValueError(f"{named}: a domain is named 'average', which results use for themselves; rename it")
    return rows


def _documents(
    rows: list[texts.Row], models: list[tuple[Model, Vocabulary]], title: str, console: Console
) -> list[corpus.Document]:
    """Cut the texts where a model's context demands it, and say which bytes a model cannot spell."""
    from fuselm.results import notes

    whole = (
        corpus.Document(id=f"{n:06d}", origin=f"{n:06d}", domain=row.domain, split="heldout", text=row.text)
        for n, row in enumerate(rows)
    )
    readers = [Reader(name=m.name, vocabulary=v, max_tokens=m.context_length) for m, v in models]
    with progress.show(console, f"{title}: cutting texts") as shown:
        shown.start(sum(len(row.text) for row in rows), unit="characters")
        documents = list(corpus.cut_to_fit(whole, readers, advance=shown.advance))
        for reader in readers:
            _, unspelled = reader.vocabulary.count_tokens_and_unspelled([d.text for d in documents])
            if any(unspelled):
                found = corpus.share_by_domain(documents, unspelled)
                shown.note(notes.describe_unspelled_text(reader.name, found, is_learned_from=False))
    return documents
