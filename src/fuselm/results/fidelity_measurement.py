"""Measure what survives the alignment of one source to one target's tokens, on any texts, outside a run.

On the texts themselves, the token that came is measured; on text that the source writes, all that its rows say.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fuselm.alignment.choices import METHODS
from fuselm.documents import corpus
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.models.segmentation import Segmentation
from fuselm.results.measured_texts import cut_documents, read_rows
from fuselm.results.report_path import check_report_path
from fuselm.system import atomic_files, progress

if TYPE_CHECKING:
    from fuselm.alignment import fidelity, span_losses
    from fuselm.alignment.aligner import Aligner
    from fuselm.sources.capture import LoadedSource
    from fuselm.stores.store import Trace

BATCH_TOKENS = 1024


@dataclass(slots=True, kw_only=True)
class _MethodSums:
    """Collect what is known about one method so far."""

    average: "fidelity.Fidelity"
    domains: "dict[str, fidelity.Fidelity]"
    outcomes: "list[span_losses.Outcome]" = field(default_factory=list)


def measure_fidelity(
    source_spec: str,
    target_spec: str,
    texts: str | Path,
    *,
    methods: Sequence[str],
    top_k: int,
    sampled_tokens: int,
    dtype: str,
    console: Console,
    report: Path | None = None,
) -> dict:
    """Return how much of one source survives alignment to one target's tokens, by each method; write a page of it.

    `domains` and `average` are `Fidelity.summarize`. `spans`, `categories`, `causes`, `informed` and `unspelled`
    (shares of bytes, if any) come from span_losses.py, `candidates_spelled` from decoding_check.py. `conditional` is
    `summarize_conditionals`, over `sampled_tokens` tokens that the source writes after the beginnings of the texts, or
    None without any. `verdict` judges by `informed`, `candidates_spelled` and `conditional`. All of these are the
    first method's; if there are several, `methods` has each one's.
    """
    methods = list(dict.fromkeys(methods))
    _check_methods(methods)
    if report is not None:
        check_report_path(report)
    title = f"fidelity {source_spec}"
    rows = read_rows(texts, title, console)
    with progress.announce(f"reading {source_spec} and {target_spec}"):
        source, target = locate_model(source_spec), locate_model(target_spec)
    vocabularies = load_vocabulary(source), load_vocabulary(target)
    documents = cut_documents(rows, list(zip((source, target), vocabularies, strict=True)), title, console)

    with progress.announce("starting torch"):
        from fuselm.alignment import span_losses
        from fuselm.alignment.aligner import Aligner
        from fuselm.alignment.decoding_check import DecodingCheck
        from fuselm.alignment.fidelity import Fidelity
        from fuselm.results.json_numbers import replace_nonfinite
        from fuselm.sources import capture

    reader = capture.load_source(source, vocabularies[0], dtype=dtype)
    read = [d.text for d in documents]
    aligners = {method: Aligner(*vocabularies, method=method, top_k=top_k, texts=read) for method in methods}
    domains = sorted({d.domain for d in documents})
    measured = {m: _MethodSums(average=Fidelity(), domains={d: Fidelity() for d in domains}) for m in methods}
    cuts: list[span_losses.Spans] = []
    candidates = DecodingCheck()
    segmentations = [vocabularies[0].segment(d.text) for d in documents]
    with progress.show_progress(console, title) as shown:
        for document, trace in _trace_documents(reader, documents, segmentations, top_k, shown):
            candidates.add(vocabularies[0], trace)
            for number, (method, aligner) in enumerate(aligners.items()):
                aligned, of = aligner.align(trace, document.text), measured[method]
                for sums in (of.domains[document.domain], of.average):
                    sums.add(trace, aligned, aligner.count_unspelled(trace, document.text))
                if number == 0:
                    cuts.append(span_losses.cut_spans(trace, aligned, document.text, vocabularies))
                mass = span_losses.compute_lost_mass(aligner, method, cuts[-1], trace, aligned)
                of.outcomes.append(span_losses.judge_spans(cuts[-1], aligned, mass))
    conditional = measure_conditionals(reader, documents, aligners, sampled_tokens, top_k, title, console)
    results = {
        m: replace_nonfinite(_summarize_method(of, cuts, candidates.share, conditional.get(m)))
        for m, of in measured.items()
    }
    if report is not None:
        from fuselm.results.pages import fidelity_page

        outcomes = {method: of.outcomes for method, of in measured.items()}
        page = fidelity_page.render_page(
            results, cuts, outcomes, vocabularies, source=source_spec, target=target_spec, top_k=top_k
        )
        atomic_files.write_text(report, page)
    return results[methods[0]] | ({"methods": results} if len(methods) > 1 else {})


def measure_conditionals(
    reader: "LoadedSource",
    documents: Sequence[corpus.Document],
    aligners: "Mapping[str, Aligner]",
    tokens: int,
    top_k: int,
    title: str,
    console: Console,
) -> dict[str, dict]:
    """Let the source write `tokens` tokens; return `summarize_conditionals` by method, or nothing if it writes none."""
    from fuselm.alignment import conditionals
    from fuselm.sources import sampling

    if not tokens:
        return {}
    with progress.show_progress(console, f"{title}: drawing texts") as shown:
        if not sampling.can_sample(reader):
            shown.note("the source cannot write text, so there is no conditional fidelity")
            return {}
        texts = sampling.sample_texts(reader, documents, tokens=tokens, seed=0, progress=shown)
    counters = {m: conditionals.ConditionalCounter(a.source, a.target) for m, a in aligners.items()}
    counts: dict[str, list[conditionals.ConditionalCounts]] = {method: [] for method in aligners}
    begins = {text.document.id: text.begin for text in texts}
    drawn = [text.document for text in texts], [text.segmentation for text in texts]
    with progress.show_progress(console, f"{title}: reading what it wrote") as shown:
        for document, trace in _trace_documents(reader, *drawn, top_k, shown):
            for method, aligner in aligners.items():
                aligned = aligner.align(trace, document.text)
                found = counters[method].count(
                    trace, aligned, document.text, domain=document.domain, begin=begins[document.id]
                )
                counts[method].append(found)
    return {method: conditionals.summarize_conditionals(of_texts) for method, of_texts in counts.items() if of_texts}


def _trace_documents(
    reader: "LoadedSource",
    documents: Sequence[corpus.Document],
    segmentations: Sequence[Segmentation],
    top_k: int,
    shown: progress.Progress,
) -> "Iterator[tuple[corpus.Document, Trace]]":
    """Yield documents with the source's rows, those of like length together."""
    from fuselm.models import forward
    from fuselm.sources import capture
    from fuselm.stores import retention

    by_id = {d.id: d for d in documents}
    policy = retention.Policy(policy="top_k", top_k=top_k)
    lengths = [len(s.ids) for s in segmentations]
    shown.start(sum(lengths), unit="tokens")
    for batch in forward.group_into_batches(lengths, BATCH_TOKENS):
        chosen = [documents[i] for i in batch], [segmentations[i] for i in batch]
        for trace in capture.trace_batch(reader, *chosen, policy=policy):
            yield by_id[trace.document], trace
            shown.advance(len(trace.tokens))


def _summarize_method(
    measured: _MethodSums, cuts: "Sequence[span_losses.Spans]", candidates_spelled: float, conditional: dict | None
) -> dict:
    from fuselm.alignment import fidelity, span_losses

    average, outcomes = measured.average, measured.outcomes
    informed = span_losses.summarize_informed(cuts, outcomes)
    unspelled = span_losses.compute_unspelled_shares(cuts)
    filled = {"unspelled": 0.0} if average.unspelled else {}
    certain = conditional and conditional["conditional_fidelity"]
    return {
        "domains": {domain: sums.summarize() | filled | sums.summarize() for domain, sums in measured.domains.items()},
        "average": average.summarize(),
        "verdict": fidelity.judge_fidelity(informed["own_bits"], informed["fidelity"], candidates_spelled, certain),
        "informed": informed,
        "conditional": conditional,
        "candidates_spelled": candidates_spelled,
        **({"unspelled": unspelled} if unspelled else {}),
        "spans": span_losses.summarize_kinds(cuts),
        "categories": span_losses.summarize_categories(cuts, outcomes),
        "causes": span_losses.summarize_causes(cuts, outcomes),
    }


def _check_methods(methods: Sequence[str]) -> None:
    for method in methods:
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"--method {method}: unknown; take one of {', '.join(METHODS)}{hint}")
