"""Write the notes beside numbers of texts that a tokenizer cannot spell as a whole (docs/tokenizers.md)."""

from collections.abc import Iterator, Mapping

from fuselm.models.segmentation import COMPARABLE, describe_shares
from fuselm.results.scoring import is_comparable

NAMED = 3  # domains in one line
SCORED = "each such byte adds 8 bits to those of the tokens, so none is credited as predicted"


FIDELITY_SCALE = (  # the documentation says the same
    "1 is perfect, and more is a loss. Less than 1 is a gain if every position is informed, because the source's other "
    "spellings of the same bytes add up. A position without information counts 0 bits, so where there are any, less "
    "than 1 is no gain."
)


def describe_unspelled_bytes(result: Mapping) -> Iterator[str]:
    """Yield what `evaluate` and `fidelity` say below their tables, for which bytes are not spelled."""
    if "unspelled" in result:  # of fidelity
        shares = result["unspelled"]
        yield (
            f"Not spelled: {shares['source']:.1%} of the bytes by the source, {shares['target']:.1%} by the "
            f"target. Nothing is learned there, and {SCORED}."
        )
    elif "unspelled" in result["average"]:
        shares = {d: row["unspelled"] for d, row in result["domains"].items()}
        yield f"unspelled: the share of bytes that the tokenizer cannot spell; {SCORED}."
        if not is_comparable(shares, "average"):
            yield f"Not comparable with other models where it is above {COMPARABLE:.0%}: {describe_shares(shares)}."


def describe_conditional(result: Mapping | None) -> str:
    """Say in a sentence what conditional fidelity a method has, of `summarize_conditionals`."""
    if result is None:
        return "Conditional fidelity: not measured, as the source wrote no text."
    measured = f"on {result['tokens']:,} tokens that the source wrote"
    if result["conditional_fidelity"] is None:
        return f"Conditional fidelity: too few tokens of any kind {measured}; draw more."
    begun = f"Conditional fidelity {result['conditional_fidelity']:.2f} {measured}"
    if result["worst_class"] is None:
        return f"{begun}: rows give every kind of token the probability with which it comes, as far as chance lets see."
    row = result["classes"][result["worst_class"]]
    return (
        f"{begun}, worst for {result['worst_class'].replace('_', ' ')}, with {row['came']:.1%} of the tokens and "
        f"{row['mass']:.1%} of the probability."
    )


def describe_unspelled_text(name: str, found: Mapping, *, is_trained_on: bool) -> str:
    """Say which bytes of texts a model cannot spell, when they are read; `found` is of `corpus.share_by_domain`."""
    domains = sorted(found["domains"].items(), key=lambda pair: -pair[1])
    parts = [f"{domain} {_format_percent(share)}" for domain, share in domains[:NAMED]]
    parts += [f"{len(domains) - NAMED} more"] if len(domains) > NAMED else []
    return (
        f"{name} cannot spell {_format_percent(found['share'])} of the bytes ({', '.join(parts)}): they cost 8 bits "
        f"each{' and are not trained on' if is_trained_on else ''}; docs/tokenizers.md"
    )


def _format_percent(share: float) -> str:
    return "less than 0.1%" if share < 0.0005 else f"{share:.1%}"


def select_unspelled_shares(row: Mapping) -> dict[str, float]:
    """Return the shares of bytes that a model of a run's summary does not spell, by domain, where there are any."""
    return {d: cell["unspelled"] for d, cell in row["domains"].items() if cell.get("unspelled")}


def mark_incomparable(shares: Mapping[str, float], domain: str) -> str:
    """Return the mark of a number that is not to be compared with other models'; empty if it may be."""
    return "" if is_comparable(shares, domain) else "†"


def describe_unspelled(models: Mapping[str, Mapping[str, float]]) -> str:
    """Say which models do not spell all bytes, and what that means; empty if all do.

    `models` has the shares by domain of each, with or without their `average`.
    """
    parts = [
        f"{name} {share:.1%} of {d}" for name, shares in models.items() for d, share in shares.items() if d != "average"
    ]
    if not parts:
        return ""
    return (
        f"Bytes that a tokenizer cannot spell: {', '.join(parts)}; {SCORED}. Numbers with over {COMPARABLE:.0%} of "
        "them are marked † and not to be compared with others."
    )
