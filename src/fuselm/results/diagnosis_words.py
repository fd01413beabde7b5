"""Say in words what a diagnosis found."""

import math
import shlex
from collections.abc import Mapping

import yaml

from fuselm.models.segmentation import COMPARABLE

# What the share of the target's own bits that it could save means; a smaller share does not help.
LEAST_GAINS = {"helps": 0.02, "hardly helps": 0.005}
COLUMNS_NOTE = (
    "Below the sources are ways to fuse, by the names that `fuselm options fuse.function` explains, and the oracle, "
    "which takes the best source at every token. expected: the average that rows expect of themselves; where it is "
    "far below the average that came, they are too sure."
)
DRAWN_NOTE = (
    "The run kept draws from the tails of rows, and not whole tails. So `expected` is too small here, and `entropy` "
    "and `log_linear`, which need whole tails, are left out: `fuselm diagnose` with the run file, in place of its "
    "folder, aligns whole rows."
)


def judge_gain(result: Mapping, domain: str) -> str:
    """Say whether the best way to fuse `helps`, `hardly helps` or `does not help` the target, by `LEAST_GAINS`."""
    own = result["own"]["bits_per_byte"][domain]
    share = result["gains"][domain]["over_target"] / max(own, 1e-9)
    return next((word for word, least in LEAST_GAINS.items() if share >= least), "does not help")


def describe_diagnosis(result: Mapping) -> list[str]:
    """Describe whether the target can learn, in which domains, how much at most, and whether one source is enough."""
    found, alone = result["gains"], result["best_source"]
    average = found["average"]
    lines = []
    if result["own"] is None:
        lines.append(
            "What the target could learn is not known: it could not be read. Diagnose the run file, and keep models "
            "where they are."
        )
    else:
        judged = result["judged"]
        opening = {"helps": "can help", "hardly helps": "can hardly help", "does not help": "cannot help"}
        lines.append(
            f"Fusing {opening[judged['average']]}: a target that learned to predict as the fused rows do would gain "
            f"{average['over_target']:.3f} bits per byte on average, besides what the text itself teaches."
        )
        order = sorted(result["domains"], key=lambda domain: -found[domain]["over_target"])
        parts = [
            f"{domain} too little to matter"
            if judged[domain] == "does not help"
            else f"{domain} at most {found[domain]['over_target']:.3f} ({found[domain]['best_source']} knows most)"
            for domain in order
        ]
        lines.append(f"By domain: {'; '.join(parts)}.")
    if len(result["sources"]) > 1:
        whole = result["sources"][alone]["bits_per_byte"]["average"]
        if not math.isfinite(whole):
            lines.append("Mixing: it takes more than one source, because none spells the text of every domain.")
            return lines
        share = average["over_best_source"] / max(whole, 1e-9)
        enough = (
            f"{alone} alone would do as well"
            if share < LEAST_GAINS["hardly helps"]
            else "it takes more than one source"
        )
        lines.append(
            f"Mixing: {enough}; the best way, {average['best_way']}, is {average['over_best_source']:.3f} bits per "
            f"byte below {alone}, the best source on average. The oracle, which knows the token that comes, is "
            f"{average['oracle_beyond']:.3f} further below: a bound, not a goal."
        )
    if result.get("write"):
        ratio = yaml.safe_dump(result["write"], default_flow_style=True, width=math.inf, allow_unicode=True).strip()
        lines.append(
            "Writing: where text is short, text written by a source that knows far more than the target helps most: "
            + shlex.quote(f"write.ratio={ratio}")
        )
    return lines


def describe_compared_share(result: Mapping) -> str:
    """Say which share of the text the numbers cover; return an empty text if they cover all of it."""
    compared = result["compared"]
    if compared["average"] > 0.9995:
        return ""
    by_domain = ", ".join(f"{compared[domain]:.0%} in {domain}" for domain in result["domains"])
    return (
        f"Bits per byte cover the {compared['average']:.0%} of the text for which every source has an aligned row "
        f"({by_domain}). `fuselm fidelity` says what an align.method loses; span and branches lose least."
    )


def describe_unspelled_sources(result: Mapping) -> str:
    """Say which sources cannot spell the text; return an empty text if all can."""
    parts = [
        f"{name} {share:.1%} of {domain}"
        for name, of in result.get("unspelled", {}).items()
        for domain, share in of.items()
    ]
    if not parts:
        return ""
    return (
        f"Bytes that a source's tokenizer cannot spell: {', '.join(parts)}. It predicts nothing there. Where they are "
        f"more than {COMPARABLE:.0%}, the source is not compared (∞), unless no source spells more."
    )
