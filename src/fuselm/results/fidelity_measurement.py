"""Measure what survives the alignment of one source to one target's tokens, on any texts or on those of a run.

On the texts themselves, the token that came is measured; on text that the source writes, all that its rows say.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fuselm.alignment.choices import METHODS
from fuselm.documents import corpus
from fuselm.models.locating import locate_model
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.command_texts import Named, cut_documents, load_vocabularies, read_rows
from fuselm.results.report_path import check_report_path
from fuselm.system import atomic_files, progress

if TYPE_CHECKING:
    from fuselm.alignment import fidelity, span_losses
    from fuselm.alignment.aligner import Aligner
    from fuselm.sources.capture import LoadedSource
    from fuselm.stores.store import Store, Trace

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
    texts: Named,
    *,
    methods: Sequence[str],
    top_k: int,
    sampled_tokens: int,
    dtype: str,
    console: Console,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
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
    rows = read_rows(texts, title, console, columns)
    with progress.announce(f"reading {source_spec} and {target_spec}"):
        source, target = locate_model(source_spec), locate_model(target_spec)
    own, other = load_vocabularies(rows, [source, target], template)
    vocabularies = own, other
    documents = cut_documents(rows, list(zip((source, target), vocabularies, strict=True)), title, console)

    with progress.announce("starting torch"):
        from fuselm.sources import capture

    reader = capture.load_source(source, vocabularies[0], dtype=dtype)
    segmentations = [vocabularies[0].segment(d.text) for d in documents]
    with progress.show_progress(console, title) as shown:
        shown.note(_describe_cost(len(documents), sum(len(s.ids) for s in segmentations), sampled_tokens))
        read = _trace_documents(reader, documents, segmentations, top_k, shown)
        first = _take_learned(read) if "branches" in methods else []
        traces = [trace for _, trace in first]
        measurement = _Measurement(documents, vocabularies, methods=methods, top_k=top_k, traces=traces)
        for document, trace in itertools.chain(first, read):
            measurement.add(document, trace)
    conditional = measure_conditionals(reader, documents, measurement.aligners, sampled_tokens, top_k, title, console)
    return measurement.finish(conditional, source=source_spec, target=target_spec, report=report)


def measure_captured_fidelity(
    captured: "Store",
    documents: Sequence[corpus.Document],
    vocabularies: tuple[Vocabulary, Vocabulary],
    *,
    names: tuple[str, str],
    methods: Sequence[str],
    top_k: int,
    console: Console,
    report: Path | None = None,
) -> dict:
    """Return what `measure_fidelity` returns, for rows that a run captured; no model is loaded.

    `vocabularies` and `names` are the source's and the target's. The source writes nothing, so `conditional` is None.
    """
    methods = list(dict.fromkeys(methods))
    _check_methods(methods)
    if report is not None:
        check_report_path(report)
    documents = [d for d in documents if d.id in captured]
    if not documents:
        raise ValueError(f"{captured.folder}: has none of the run's training documents; capture again")
    measurement = _Measurement(documents, vocabularies, methods=methods, top_k=top_k, traces=captured)
    with progress.show_progress(console, f"fidelity {names[0]}") as shown:
        shown.start(len(documents), unit="documents")
        for document in documents:
            measurement.add(document, captured.read(document.id))
            shown.advance(1)
    return measurement.finish({}, source=names[0], target=names[1], report=report)


class _Measurement:
    """Measure documents one by one by several methods; `finish` returns the result and writes the page."""

    def __init__(
        self,
        documents: Sequence[corpus.Document],
        vocabularies: tuple[Vocabulary, Vocabulary],
        *,
        methods: Sequence[str],
        top_k: int,
        traces: "Iterable[Trace]" = (),
    ):
        from fuselm.alignment.aligner import Aligner
        from fuselm.alignment.decoding_check import DecodingCheck
        from fuselm.alignment.fidelity import Fidelity

        texts, domains = [d.text for d in documents], sorted({d.domain for d in documents})
        learned = {"texts": texts, "traces": traces}
        self.aligners = {m: Aligner(*vocabularies, method=m, top_k=top_k, **learned) for m in methods}
        self._vocabularies, self._top_k = vocabularies, top_k
        self._sums = {m: _MethodSums(average=Fidelity(), domains={d: Fidelity() for d in domains}) for m in methods}
        self._cuts: list[span_losses.Spans] = []
        self._candidates = DecodingCheck()

    def add(self, document: corpus.Document, trace: "Trace") -> None:
        """Align a document by each method, and measure what arrives."""
        from fuselm.alignment import span_losses

        self._candidates.add(self._vocabularies[0], trace)
        for number, (method, aligner) in enumerate(self.aligners.items()):
            aligned, measured = aligner.align(trace, document.text), self._sums[method]
            for sums in (measured.domains[document.domain], measured.average):
                sums.add(trace, aligned, aligner.count_unspelled(trace, document.text))
            if number == 0:
                self._cuts.append(span_losses.cut_spans(trace, aligned, document.text, self._vocabularies))
            mass = span_losses.compute_lost_mass(aligner, method, self._cuts[-1], trace, aligned)
            measured.outcomes.append(span_losses.judge_spans(self._cuts[-1], aligned, mass))

    def finish(
        self, conditional: Mapping[str, dict], *, source: str, target: str, report: Path | None
    ) -> dict[str, Any]:
        """Return the first method's result, with all of them if there are several, and write the page."""
        from fuselm.results.json_numbers import replace_nonfinite

        results = {
            m: replace_nonfinite(_summarize_method(sums, self._cuts, self._candidates.share, conditional.get(m)))
            for m, sums in self._sums.items()
        }
        if report is not None:
            from fuselm.results.pages import fidelity_page

            outcomes = {method: sums.outcomes for method, sums in self._sums.items()}
            named = {"source": source, "target": target, "top_k": self._top_k}
            page = fidelity_page.render_page(results, self._cuts, outcomes, self._vocabularies, **named)
            atomic_files.write_text(report, page)
        return next(iter(results.values())) | ({"methods": results} if len(results) > 1 else {})


def _take_learned(
    read: "Iterator[tuple[corpus.Document, Trace]]",
) -> "list[tuple[corpus.Document, Trace]]":
    """Take the first documents that are read, as many as `branches` learns from."""
    from fuselm.alignment.followers import MOST_ENTRIES

    taken, entries = [], 0
    while entries < MOST_ENTRIES and (pair := next(read, None)) is not None:
        taken.append(pair)
        entries += len(pair[1].distributions.ids)
    return taken


def _describe_cost(documents: int, tokens: int, sampled_tokens: int) -> str:
    """Say what a measurement will do, before it begins."""
    reading = f"the source reads {documents:,} document{'s' if documents != 1 else ''}, {tokens:,} tokens"
    if not sampled_tokens:
        return reading
    return (
        f"{reading}; then it writes {sampled_tokens:,} tokens and reads them, which takes longest "
        "(--sampled-tokens 0 leaves that out)"
    )


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
    lengths = [len(s.read_ids) for s in segmentations]
    shown.start(sum(len(s.ids) for s in segmentations), unit="tokens")
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
