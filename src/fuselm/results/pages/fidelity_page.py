"""Write the page of `fuselm fidelity --report`: is this source of use to this target, what is lost, where and why.

The page takes its numbers from the command's result; the spans themselves are only for the drawings.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from fuselm.alignment import conditionals, fidelity, span_losses
from fuselm.alignment.span_losses import Outcome, Spans
from fuselm.models.token_text import show_token
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.notes import FIDELITY_SCALE, describe_conditional, describe_unspelled_bytes
from fuselm.results.pages import rendering
from fuselm.system.public_names import name_publicly

MOST_WORST_SPANS = 12  # spans shown of each method
CONTEXT_BYTES = 18  # bytes drawn before and after one, at least, where there are as many
LEAST_BITS = 0.01  # lost by a span that is looked at
KIND_STYLES = {"one_to_one": "better", "one_to_many": "source-5", "many_to_one": "source-2", "many_to_many": "source-1"}
ARRIVED = "arrived"
CAUSE_STYLES = {
    ARRIVED: "better",
    "tail_of_the_source": "base",
    "no_text": "source-2",
    "unknown_continuation": "source-5",
    "cut": "source-1",
    "maps_to_no_token": "source-3",
    span_losses.UNPAIRED: "clm",
    span_losses.SPLIT: "worse",
    span_losses.UNSPELLED: "source-4",
}


def render_page(
    results: Mapping[str, Mapping],
    cuts: Sequence[Spans],
    outcomes: Mapping[str, Sequence[Outcome]],
    vocabularies: tuple[Vocabulary, Vocabulary],
    *,
    source: str,
    target: str,
    top_k: int,
) -> str:
    """Make one HTML page that needs nothing else.

    `results` are those of `measure_fidelity`, by method; the first method is judged.
    """
    first = next(iter(results))
    masses = {method: _add_arrived(result["causes"]["mass"]) for method, result in results.items()}
    return rendering.render_template(
        "fidelity.html.jinja",
        source=name_publicly(source),
        target=name_publicly(target),
        top_k=top_k,
        results=results,
        first=first,
        headline=write_headline(results[first], first),
        notes=list(describe_unspelled_bytes(results[first])),
        conditionals={m: r["conditional"] for m, r in results.items() if r["conditional"]},
        conditional_note=describe_conditional(results[first]["conditional"]),
        least_tokens=conditionals.LEAST_TOKENS,
        advice=list(write_advice(results, first)),
        verdict_styles=dict(zip(fidelity.VERDICTS, ("better", "clm", "worse"), strict=True)),
        bounds=fidelity.VERDICTS,
        scale=FIDELITY_SCALE,
        documents=len(cuts),
        bytes=sum(cut.edges[-1] for cut in cuts),
        tokens=[sum(len(cut.source_ids) for cut in cuts), sum(len(cut.target_ids) for cut in cuts)],
        kind_styles=KIND_STYLES,
        kinds={
            title: {kind: row[unit] for kind, row in results[first]["spans"].items()}
            for title, unit in (("target tokens", "target_tokens"), ("bytes", "bytes"))
        },
        cause_styles={c: style for c, style in CAUSE_STYLES.items() if any(m[c] for m in masses.values())},
        masses=masses,
        worst={m: find_worst_spans(cuts, outcomes, m, vocabularies) for m in results},
        words=_spell_out,
        tenths=_format_tenths,
        version=metadata.version("fuselm"),
    )


def write_headline(result: Mapping, method: str) -> tuple[str, str]:
    """State the verdict on one method, and the numbers it goes by, in plain words."""
    average, informed, mass = result["average"], result["informed"], result["causes"]["mass"]
    positions = (
        "every target position is" if average["coverage"] == 1 else f"{average['coverage']:.1%} of positions are"
    )
    bits = "all" if informed["own_bits"] == 1 else f"{informed['own_bits']:.1%}"
    ratio = "∞" if informed["fidelity"] is None else f"{informed['fidelity']:.3f}"
    where = "" if average["coverage"] == 1 else " in those"
    return (
        f"{result['verdict'].capitalize()} with {method}",
        f"{positions} informed and {bits} of the source's bits arrive, at {ratio} times their own number. "
        f"{average['mass_lost']:.1%} of the probability{where} reaches no token, most of it by the "
        f"{_spell_out(max(span_losses.CAUSES[:-3], key=lambda cause: mass[cause]))}. "
        f"{result['candidates_spelled']:.1%} of the source's other candidates spell what their bytes say. "
        f"{describe_conditional(result['conditional'])}",
    )


def write_advice(results: Mapping[str, Mapping], first: str) -> Iterator[str]:
    """Advise what can be done about the largest losses."""
    result = results[first]
    best = max(results, key=lambda m: results[m]["informed"]["own_bits"])
    if results[best]["informed"]["own_bits"] > result["informed"]["own_bits"] + 0.01:
        share = results[best]["informed"]["own_bits"]
        yield f"Align with {best} instead of {first}: {share:.1%} of the source's bits arrive."
    elif result["informed"]["own_bits"] < fidelity.VERDICTS["usable"][0] and not set(span_losses.BY_BYTES) & set(
        results
    ):
        yield "Try `--method span`, which informs every position that both tokenizers spell."
    mass = result["causes"]["mass"]
    if mass["tail_of_the_source"] > 0.05:
        share = mass["tail_of_the_source"]
        yield (
            f"{share:.1%} of the mass is beyond the entries that are kept here. A run draws from it (`capture.draws`), "
            "so it is not lost there; `--top-k` keeps more of it here."
        )
    if mass["cut"] > 0.01:
        yield f"Keep more aligned entries (`align.top_k` in a run): {mass['cut']:.1%} of the mass is cut there."
    poor = [name for name, c in result["categories"].items() if c["own_bits_informed"] < 0.9 and c["bytes"] > 0.01]
    if poor:
        names = ", ".join(map(_spell_out, poor))
        yield f"More than a tenth of the bits of {names} does not arrive; the table by category says how much does."
    own = result["average"]["own_bits_per_byte"]
    yield (
        f"Is there something to learn? The source needs {own:.3f} bits per byte of these texts; "
        "`fuselm evaluate TARGET --texts FILE` says what the target needs."
    )


def find_worst_spans(
    cuts: Sequence[Spans],
    outcomes: Mapping[str, Sequence[Outcome]],
    method: str,
    vocabularies: tuple[Vocabulary, Vocabulary],
) -> dict:
    """Find the spans that lose the most, the bits lost by all spans, and their share of the source's bits.

    Spans of the same tokens count together, and are drawn where they lose most.
    """
    found: dict[tuple, dict] = {}
    total = own = 0.0
    for n, (cut, outcome) in enumerate(zip(cuts, outcomes[method], strict=True)):
        lost = span_losses.compute_lost_bits(cut, outcome)
        total += float(lost.clip(0).sum())
        own += float(cut.own.sum())
        for k in (lost > LEAST_BITS).nonzero()[0].tolist():
            ids = tuple(cut.source_ids[cut.of_source == k].tolist()), tuple(cut.target_ids[cut.of_target == k].tolist())
            bits = float(lost[k])
            entry = found.setdefault(ids, {"count": 0, "lost": 0.0, "most": 0.0})
            entry["count"] += 1
            entry["lost"] += bits
            if bits > entry["most"]:
                entry |= {"most": bits, "place": (n, k)}
    chosen = sorted(found.values(), key=lambda entry: -entry["lost"])[:MOST_WORST_SPANS]
    entries = []
    for entry in chosen:
        n, k = entry["place"]
        by_method = {m: outcomes[m][n] for m in outcomes}
        entries.append(
            {"count": entry["count"], "lost": entry["lost"], **_describe_span(cuts[n], by_method, method, k)}
        )
        entries[-1] |= draw_span(cuts[n], k, vocabularies)
    return {"bits": total, "share": total / own if own else 0.0, "entries": entries}


def _describe_span(cut: Spans, outcomes: Mapping[str, Outcome], method: str, k: int) -> dict:
    mass = outcomes[method].mass[k]
    return {
        "kind": _spell_out(span_losses.KINDS[cut.kinds[k]]),
        "category": _spell_out(span_losses.CATEGORIES[cut.categories[k]]),
        "informed": bool(outcomes[method].informed[k]),
        "own": float(cut.own[k]),
        "aligned": {m: float(o.aligned[k]) if o.informed[k] else None for m, o in outcomes.items()},
        "cause": _spell_out(span_losses.CAUSES[mass.argmax()]),
    }


def draw_span(cut: Spans, k: int, vocabularies: tuple[Vocabulary, Vocabulary]) -> dict:
    """Draw span k and its neighbours as boxes on a grid, a column between adjacent token ends of either side."""
    first, last = k, k
    while first > 0 and cut.edges[k] - cut.edges[first] < CONTEXT_BYTES:
        first -= 1
    while last + 1 < len(cut.own) and cut.edges[last + 1] - cut.edges[k + 1] < CONTEXT_BYTES:
        last += 1
    boxes, corners = [], set()
    sides = (
        (cut.source_ids, cut.source_starts, cut.of_source),
        (cut.target_ids, cut.target_starts, cut.of_target),
    )
    for row, (vocabulary, (ids, starts, of)) in enumerate(zip(vocabularies, sides, strict=True), 1):
        ends = [*starts[1:].tolist(), int(cut.edges[-1])]
        for i in ((of >= first) & (of <= last)).nonzero()[0].tolist():
            # a token without text still gets a column: its order within the byte where it is
            begin, end = (int(starts[i]), 0), (ends[i], 0)
            if begin == end:
                begin = end = (begin[0], -1)
            corners |= {begin, end}
            text = show_token(vocabulary.token_bytes[ids[i]])
            name = vocabulary.token_strings[ids[i]] or ""
            boxes.append(
                {"row": row, "begin": begin, "end": end, "text": text, "title": f"{ids[i]} {name}", "main": of[i] == k}
            )
    columns = {corner: n for n, corner in enumerate(sorted(corners), 1)}
    for box in boxes:
        box["begin"], box["end"] = columns[box["begin"]], max(columns[box["end"]], columns[box["begin"]] + 1)
    return {"boxes": boxes, "columns": max((box["end"] for box in boxes), default=2) - 1}


def _add_arrived(mass: Mapping[str, float]) -> dict[str, float]:
    return {ARRIVED: max(1.0 - sum(mass.values()), 0.0), span_losses.UNSPELLED: 0.0, **mass}


def _format_tenths(bits: float) -> str:
    return "∞" if math.isinf(bits) else f"{bits:,.1f}"


def _spell_out(name: str) -> str:
    return name.replace("_", " ")
