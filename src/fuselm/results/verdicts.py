"""Judge the differences between a run's models, in words."""

from collections.abc import Mapping

from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.results.notes import select_unspelled_shares
from fuselm.results.pages.formats import format_interval, format_signed
from fuselm.results.scoring import is_comparable

TARGETS = ("base", "clm", "fused")  # models of one size, below the sources in tables

ANSWERS = {
    "better": "Fusion helped.",
    "level": "Fusion made no difference that can be measured.",
    "worse": "Fusion hurt.",
    "unknown": "There are too few held-out documents to tell.",
}


def judge(difference: Mapping[str, float | None]) -> str:
    """Judge a difference of bits per byte by its interval.

    It is `better` if the interval is below zero, `worse` if above, `level` if it holds zero, and `unknown` if there is
    none, or if it is of one seed and too small for that.
    """
    if difference["low"] is None or difference.get("too_small"):
        return "unknown"
    if difference["high"] < 0:
        return "better"
    return "worse" if difference["low"] > 0 else "level"


def describe_outcome(summary: Mapping) -> str:
    """Describe in one sentence how fused compares with base, clm and the best single source."""
    over_base = [judge(d) for d in summary["differences"]["fused-base"]["domains"].values()]
    others = [f"{word} on {over_base.count(word)}" for word in ("level", "worse", "unknown") if word in over_base]
    average = summary["differences"]["fused-clm"]["average"]
    value = format_signed(average["value"])
    interval = "" if average["low"] is None else f" {format_interval(average, format_signed)}"
    return (
        f"fused is better than base on {over_base.count('better')} of {len(over_base)} domains"
        f"{' (' + ', '.join(others) + ')' if others else ''}; fused - clm = {value}{interval} bits per byte on "
        f"average: {judge(average)}{_explain_unknown(average)}{_compare_with_best_source(summary)}"
    )


def _compare_with_best_source(summary: Mapping) -> str:
    """Say how fused compares with the best source; nothing if that is the target, which `base` stands for."""
    best = find_best_source(summary)
    if summary["models"][best] == summary["models"]["base"]:
        return ""
    average = summary["differences"][f"fused-{best}"]["average"]
    interval = "" if average["low"] is None else f" {format_interval(average, format_signed)}"
    words = {
        "better": "is worse than fused",
        "worse": "is still better than fused",
        "level": "is level with fused",
        "unknown": "has no interval against fused",
    }
    return (
        f"; the best single source, {best}, {words[judge(average)]}: "
        f"fused - {best} = {format_signed(average['value'])}{interval}"
    )


def describe_answer(summary: Mapping) -> str:
    """Answer in a few words whether fusion helped, and whether a source alone is better than what came out."""
    answer = ANSWERS[judge(summary["differences"]["fused-clm"]["average"])]
    best = find_best_source(summary)
    if judge(summary["differences"][f"fused-{best}"]["average"]) == "worse":
        return f"{answer} {best} alone is better, at its own size."
    return answer


def _explain_unknown(cell: Mapping) -> str:
    if cell["low"] is not None:
        return ""
    return f", because a domain has fewer than {FEWEST_DOCUMENTS} held-out documents"


def find_best_source(summary: Mapping) -> str:
    """Return the source with the fewest bits per byte on average.

    Sources that cannot spell the text of every domain are considered only if there are no others.
    """
    models = summary["models"]
    sources = [n for n in models if n not in TARGETS]
    comparable = [n for n in sources if is_comparable(select_unspelled_shares(models[n]), "average")]
    return min(comparable or sources, key=lambda n: models[n]["average"]["bits_per_byte"])


def select_cell(row: Mapping, domain: str) -> Mapping[str, float]:
    """Return a row's value and interval of a domain or of `average`."""
    return row["average"] if domain == "average" else row["domains"][domain]
