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
