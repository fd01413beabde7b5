"""What is said beside numbers of texts that a tokenizer does not spell whole. docs/tokenizers.md"""

from collections.abc import Iterator, Mapping

from fuselm.evaluation import is_comparable
from fuselm.segmentation import COMPARABLE, describe_shares

SCORED = "each such byte adds 8 bits to those of the tokens, so none is credited as predicted"


def unspelled_notes(result: Mapping) -> Iterator[str]:
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


def unspelled_of(row: Mapping) -> dict[str, float]:
    """Return the shares of bytes that a model of a run's summary does not spell, by domain, where there are any."""
    return {d: cell["unspelled"] for d, cell in row["domains"].items() if cell.get("unspelled")}


def describe_unspelled(models: Mapping[str, Mapping]) -> str:
    """Say which models of a run's summary do not spell all bytes, and what that means; empty if all do."""
    parts = [f"{name} {share:.1%} of {d}" for name, row in models.items() for d, share in unspelled_of(row).items()]
    if not parts:
        return ""
    return (
        f"Bytes that a tokenizer cannot spell: {', '.join(parts)}; {SCORED}. Numbers with over {COMPARABLE:.0%} of "
        "them are marked † and not to be compared with others."
    )
