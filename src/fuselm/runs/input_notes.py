"""Say before a run begins what its result will lack: intervals, files that are not read, a source to learn from."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fuselm.documents import corpus, splitting, text_files
from fuselm.results.bootstrap import FEWEST_DOCUMENTS
from fuselm.runs import config

if TYPE_CHECKING:
    from fuselm.runs.inputs import Inputs

LARGEST_SHARE = 0.5  # of a domain's documents that may be suggested to be held out
SHOWN = 8  # domains that a note names

Counts = Mapping[str, Mapping[str, int]]  # documents by domain, and by the split that their rows name


def describe_inputs(inputs: "Inputs", run: config.RunOptions) -> list[str]:
    """Return a line for each thing that the user may want to change before anything is made."""
    few = describe_few_heldout(inputs.domain_counts, dev=run.corpus.dev, heldout=run.corpus.heldout)
    notes = [few, text_files.describe_unread_files(run.corpus.files)]
    if all(model.fingerprint == inputs.target.fingerprint for model in inputs.sources.values()):
        notes.append("sources: the target is the only one, so there is nothing to learn from others; add another model")
    if inputs.repeated_files:
        named = ", ".join(str(path) for path in sorted(inputs.repeated_files)[:3]) + (
            ", …" if len(inputs.repeated_files) > 3 else ""
        )
        notes.append(
            f"corpus.files: {len(inputs.repeated_files)} files are left out, because they are copies ({named})"
        )
    train = run.train
    if train.clm.passes is not None and train.passes < train.clm.passes:
        notes.append(
            f"train.passes: {train.passes} is for the fused model, and the baseline makes {train.clm.passes}; set "
            "train.clm.passes, too, if both should be short"
        )
    return [note for note in notes if note]


def count_heldout(counts: Mapping[str, int], *, dev: float, heldout: float) -> int:
    """Count the documents of a domain that are held out, from how many name each split or none."""
    drawn = counts.get(corpus.UNASSIGNED, 0)
    return counts.get("heldout", 0) + (splitting.count_held_out(drawn, dev, heldout)[1] if drawn else 0)


def suggest_heldout(counts: Counts, *, dev: float) -> float | None:
    """Return the smallest share, in hundredths, that holds out enough documents of every domain; None if none does.

    Domains whose rows all name a split do not count.
    """
    drawn = {domain: said for domain, said in counts.items() if said.get(corpus.UNASSIGNED)}
    for hundredths in range(1, round(100 * min(LARGEST_SHARE, 0.99 - dev)) + 1):
        share = hundredths / 100
        if all(count_heldout(said, dev=dev, heldout=share) >= FEWEST_DOCUMENTS for said in drawn.values()):
            return share
    return None


def describe_few_heldout(counts: Counts, *, dev: float, heldout: float) -> str | None:
    """Describe the domains that hold out too few documents for an interval, and what to do; None if there are none."""
    held = {domain: count_heldout(said, dev=dev, heldout=heldout) for domain, said in sorted(counts.items())}
    few = {domain: count for domain, count in held.items() if count < FEWEST_DOCUMENTS}
    if not few:
        return None
    named = ", ".join(f"{domain} {count}" for domain, count in list(few.items())[:SHOWN])
    more = ", …" if len(few) > SHOWN else ""
    where = f"in {len(few)} of {len(held)} domains ({named}{more})" if len(held) > 1 else f"({named})"
    return (
        f"corpus: fewer than {FEWEST_DOCUMENTS} documents are held out {where}, so the result will have no intervals "
        f"there and no verdict on average; {_advise(counts, few, dev=dev, heldout=heldout)}"
    )


def _advise(counts: Counts, few: Mapping[str, int], *, dev: float, heldout: float) -> str:
    """Say how the domains in `few` get enough documents."""
    if not any(counts[domain].get(corpus.UNASSIGNED) for domain in few):
        return f"give {FEWEST_DOCUMENTS} or more of each domain's rows the split heldout"
    needed = f"{math.ceil((FEWEST_DOCUMENTS - 0.5) / heldout)} or more documents a domain"
    share = suggest_heldout({domain: counts[domain] for domain in few}, dev=dev)
    if share is None:
        return f"have {needed}, or fewer and larger domains"
    return f"set corpus.heldout={share:.2f}, or have {needed}"
