"""Can fusing help? What is said of it before any training, from the aligned stores of a run's training documents.

All in bits per byte of the same tokens, those of which every source's rows say something: each source; each way to
fuse; and the oracle, the best source of each token, beyond which no weights get. Where the target is among the
sources, what it is short of them is what it could learn. `expected` is what the rows themselves expect to lose: a text
that costs less was chosen for, one that costs more was foreseen too surely.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import yaml
from jaxtyping import Bool
from numpy import ndarray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fuselm.documents.corpus import Document
from fuselm.fusion import tails
from fuselm.fusion.fuse import fuse, learn, unspelled_shares
from fuselm.models.segmentation import COMPARABLE
from fuselm.results.json_numbers import replace_nonfinite
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, Trace
from fuselm.system.progress import Progress
from fuselm.system.terminal import plain

# The ways to fuse that are tried, by what is said of them; of each the options of `fuse`.
WAYS: dict[str, dict] = {
    "min_ce, document": {"function": "min_ce", "level": "document"},
    "avg_ce, document": {"function": "avg_ce", "level": "document"},
    "log_linear, document": {"function": "log_linear", "level": "document"},
    "entropy, token": {"function": "entropy", "level": "token"},
    "bayes": {"function": "bayes", "level": "token"},
    "fixed, learned weights": {"function": "fixed", "level": "token"},
}
OF_TAILS = ("log_linear, document", "entropy, token")  # which ask what a row's tail is like, and draws do not tell
LEARNED = "fixed, learned weights"
ORACLE = "oracle"
DRAWN = (
    "These rows hold draws from their tails: what they expect to lose comes out too sure, and `entropy` and "
    "`log_linear`, which need whole tails, are left out. Diagnose the run file to have them."
)
JUDGED = {"helps": 0.02, "hardly helps": 0.005}  # by the share of the target's own bits that it could save
# A source that saves this share of them in a domain should write more of it, so much; docs/results.md has such texts.
WRITES, RATIO = 0.2, 4


def diagnose(
    stores: Mapping[str, Store],
    documents: Sequence[Document],
    *,
    own: str | None,
    vocabulary_size: int,
    writers: Sequence[str] = (),
    drawn: bool = False,
    progress: Progress,
) -> dict:
    """Every number of a diagnosis. `own` is the source that is the target itself, if one is; `writers` those that could
    write more text; `drawn`, whether rows hold draws from their tails.

    `sources` and `ways` have `bits_per_byte` by domain and on average, and what was `expected`; `compared` the shares
    of bytes that these are of: an alignment that leaves tokens without a row leaves them out; `wins` the shares of
    tokens and documents of a domain that each source predicts best; `agreement` is of pairs of sources; `write` is the
    `write.ratio` of the writers that know far more than the target. `unspelled` is there where a source's tokenizer
    does not spell bytes: their shares by domain. A source has no bits where it is more than `COMPARABLE`.
    """
    names = list(stores)
    missing = sum(any(d.id not in s for s in stores.values()) for d in documents)
    documents = [d for d in documents if all(d.id in s for s in stores.values())]
    if not documents:
        raise ValueError("no training document is in the aligned stores of all sources; align again")
    domains = sorted({d.domain for d in documents})
    learned = learn(stores, documents, {d: [1.0] * len(names) for d in domains}, [1.0] * len(names), vocabulary_size)
    ways = {way: options for way, options in WAYS.items() if not (drawn and way in OF_TAILS)}
    unspelled = {name: unspelled_shares(store) for name, store in stores.items()}
    left_out = {domain: _left_out(names, unspelled, domain, own) for domain in domains}
    sums = {name: _Sums(domains) for name in [*names, *ways, ORACLE]}
    wins = {domain: {"tokens": np.zeros(len(names)), "documents": np.zeros(len(names))} for domain in domains}
    pairs = {pair: np.zeros(3) for pair in combinations(range(len(names)), 2)}
    progress.start(len(documents), unit="documents")
    for document in documents:
        traces = [store.read(document.id) for store in stores.values()]
        heard = np.array([name not in left_out[document.domain] for name in names])
        common = np.logical_and.reduce([traces[n].distributions.informed for n in np.flatnonzero(heard)])
        for name, trace in zip(names, traces, strict=True):
            sums[name].add(document.domain, trace, common, vocabulary_size)
        for way, options in ways.items():
            prior = learned[document.domain] if way == LEARNED else None
            fused = fuse(traces, vocabulary_size=vocabulary_size, prior=prior, **options)
            sums[way].add(document.domain, fused, common, vocabulary_size)
        best = fuse(traces, vocabulary_size=vocabulary_size, function=ORACLE)
        sums[ORACLE].add(document.domain, best, common, vocabulary_size)
        wins[document.domain]["tokens"] += best.weights.sum(axis=0, dtype=float) * heard
        nats = np.where(heard, [trace.nats for trace in traces], np.inf)
        wins[document.domain]["documents"] += (nats == nats.min()) / (nats == nats.min()).sum()
        for (a, b), total in pairs.items():
            total += _agreement(traces[a].distributions, traces[b].distributions, vocabulary_size)
        progress.advance(1)
    compared = sums[ORACLE].compared()
    for domain, share in compared.items():
        if share == 0:
            raise ValueError(
                f"no token of domain '{domain}' has rows of all sources; take another align.method, such as span, or "
                "other sources"
            )
    for domain, silent in left_out.items():
        for name in silent:
            sums[name].nats[domain] = sums[name].expected[domain] = math.inf
    values = {name: total.summary() for name, total in sums.items()}
    result = {
        "documents": len(documents),
        "left_out": missing,
        "drawn": drawn,
        "tokens": int(sum(sums[names[0]].tokens.values())),
        "bytes": int(sum(sums[names[0]].size.values())),
        "compared": compared,
        "domains": domains,
        "target": own,
        "sources": {name: values[name] for name in names},
        "ways": {way: values[way] for way in ways},
        "oracle": values[ORACLE],
        "weights": {domain: dict(zip(names, weights, strict=True)) for domain, weights in learned.items()},
        "wins": {
            domain: {unit: dict(zip(names, (w / max(w.sum(), 1e-9)).tolist(), strict=True)) for unit, w in of.items()}
            for domain, of in wins.items()
        },
        "agreement": [
            {"sources": [names[a], names[b]], "same_first": same / max(count, 1), "overlap": overlap / max(count, 1)}
            for (a, b), (count, same, overlap) in pairs.items()
        ],
    }
    if any(unspelled.values()):
        result["unspelled"] = {name: of for name, of in unspelled.items() if of}
    result["best_source"] = _best_source(result)
    result["gains"] = _gains(result)
    if own is not None:
        result["judged"] = {domain: _judged(result, domain) for domain in [*domains, "average"]}
        result["write"] = _write(result, writers)
    return replace_nonfinite(result | {"verdict": _verdict(result)})


def _left_out(
    names: Sequence[str], unspelled: Mapping[str, Mapping[str, float]], domain: str, own: str | None
) -> set[str]:
    """Return the sources that do not spell enough of a domain to be compared; none if all are so, never the target."""
    lacking = {name for name in names if unspelled[name].get(domain, 0.0) > COMPARABLE}
    return set() if len(lacking) == len(names) else lacking - {own}


class _Sums:
    """Nats that texts cost and were expected to, by domain."""

    def __init__(self, domains: Sequence[str]):
        self.size, self.bytes, self.tokens, self.nats, self.expected = (dict.fromkeys(domains, 0.0) for _ in range(5))

    def add(self, domain: str, trace: Trace, compared: Bool[ndarray, "tokens"], vocabulary_size: int) -> None:
        rows = trace.distributions
        self.size[domain] += trace.size
        self.bytes[domain] += float(trace.lengths[compared].sum())
        self.tokens[domain] += len(rows)
        self.nats[domain] -= float(rows.gold[compared].sum(dtype=float))
        self.expected[domain] += float(tails.entropy(rows, vocabulary_size)[compared].sum())

    def compared(self) -> dict[str, float]:
        """The shares of bytes that the sums are of."""
        shares = {domain: self.bytes[domain] / max(size, 1) for domain, size in self.size.items()}
        return shares | {"average": sum(shares.values()) / len(shares)}

    def summary(self) -> dict[str, dict[str, float]]:
        return {"bits_per_byte": self._per_byte(self.nats), "expected": self._per_byte(self.expected)}

    def _per_byte(self, nats: Mapping[str, float]) -> dict[str, float]:
        values = {domain: n / max(self.bytes[domain], 1) / math.log(2) for domain, n in nats.items()}
        return values | {"average": sum(values.values()) / len(values)}


def _agreement(left: Distributions, right: Distributions, vocabulary_size: int) -> np.ndarray:
    """Tokens that both say something of; of those, how many have the same first id, and the sum of min(p, q)."""
    both = left.informed & right.informed
    firsts, keys, masses = [], [], []
    for d in (left, right):
        order = np.lexsort((d.ids, -d.logprobs, d.rows))
        first = np.full(len(d), -1)
        first[d.informed] = d.ids[order][d.offsets[:-1][d.informed]]
        firsts.append(first)
        keys.append(d.rows * vocabulary_size + d.ids)
        masses.append(np.exp(d.logprobs.astype(np.float64)))
    _, at, other = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    overlap = np.minimum(masses[0][at], masses[1][other]).sum()
    return np.array([both.sum(), (both & (firsts[0] == firsts[1])).sum(), overlap], np.float64)


def _best_source(result: Mapping) -> str:
    """The source, other than the target, with the fewest bits per byte on average; of those that spell all domains, if
    there are any."""
    others = [name for name in result["sources"] if name != result["target"]] or list(result["sources"])
    return min(others, key=lambda n: result["sources"][n]["bits_per_byte"]["average"])


def _gains(result: Mapping) -> dict[str, dict]:
    """By domain and on average, the best source and the best way to fuse; how far that is below the target's own bits
    (None without the target) and below the source that is best on average, and the oracle below it."""
    sources, ways = result["sources"], result["ways"]
    found = {}
    for domain in [*result["domains"], "average"]:
        way = min(ways, key=lambda n: ways[n]["bits_per_byte"][domain])
        bits = ways[way]["bits_per_byte"][domain]
        own = sources[result["target"]]["bits_per_byte"][domain] if result["target"] else None
        found[domain] = {
            "best_source": min(sources, key=lambda n: sources[n]["bits_per_byte"][domain]),
            "best_way": way,
            "over_target": None if own is None else own - bits,
            "over_best_source": sources[result["best_source"]]["bits_per_byte"][domain] - bits,
            "oracle_beyond": bits - result["oracle"]["bits_per_byte"][domain],
        }
    return found


def _judged(result: Mapping, domain: str) -> str:
    """Whether the best way to fuse leaves the target anything to learn: of `JUDGED`, the first whose share it has."""
    own = result["sources"][result["target"]]["bits_per_byte"][domain]
    share = result["gains"][domain]["over_target"] / max(own, 1e-9)
    return next((word for word, least in JUDGED.items() if share >= least), "does not help")


def _write(result: Mapping, writers: Sequence[str]) -> dict[str, dict[str, int]]:
    """By source, the domains of which it should write text: where it is the best writer, and far beyond the target."""
    sources, ratio = result["sources"], {}
    for domain in result["domains"] if writers else ():
        best = min(writers, key=lambda name: sources[name]["bits_per_byte"][domain])
        own = sources[result["target"]]["bits_per_byte"][domain]
        if sources[best]["bits_per_byte"][domain] < (1 - WRITES) * own:
            ratio.setdefault(best, {})[domain] = RATIO
    return ratio


def _verdict(result: Mapping) -> list[str]:
    """In words: can the target learn, in which domains and how much at most; does it take more than one source."""
    found, alone = result["gains"], result["best_source"]
    average = found["average"]
    lines = []
    if result["target"] is None:
        lines.append("What the target could learn is not known: it is not among the sources; add it to see.")
    else:
        judged = result["judged"]
        opening = {"helps": "can help", "hardly helps": "can hardly help", "does not help": "cannot help"}
        lines.append(
            f"Fusing {opening[judged['average']]}: a target that learned to predict as the fused rows do would gain "
            f"{average['over_target']:.3f} bits per byte on average, besides what the text itself teaches."
        )
        order = sorted(result["domains"], key=lambda domain: -found[domain]["over_target"])
        parts = [
            f"{domain} nothing to speak of"
            if judged[domain] == "does not help"
            else f"{domain} at most {found[domain]['over_target']:.3f} ({found[domain]['best_source']} knows most)"
            for domain in order
        ]
        lines.append(f"By domain: {'; '.join(parts)}.")
    if len(result["sources"]) > 1:
        whole = result["sources"][alone]["bits_per_byte"]["average"]
        if not math.isfinite(whole):
            lines.append("Mixing: it takes more than one source, for none spells the text of every domain.")
            return lines
        share = average["over_best_source"] / max(whole, 1e-9)
        enough = (
            f"{alone} alone would do as well" if share < JUDGED["hardly helps"] else "it takes more than one source"
        )
        lines.append(
            f"Mixing: {enough}; the best way, {average['best_way']}, is {average['over_best_source']:.3f} bits per "
            f"byte below {alone}, the best source on average. Choosing by the token that comes would be "
            f"{average['oracle_beyond']:.3f} further: a bound, and no aim."
        )
    if result.get("write"):
        ratio = yaml.safe_dump(result["write"], default_flow_style=True, width=math.inf, allow_unicode=True).strip()
        lines.append(
            "Writing: where text is short, more of it by a source that knows far more than the target was worth most: "
            + shlex.quote(f"write.ratio={ratio}")
        )
    return lines


def partly(result: Mapping) -> str:
    """What the numbers are of, where that is not all of the text."""
    compared = result["compared"]
    if compared["average"] > 0.9995:
        return ""
    of = ", ".join(f"{compared[domain]:.0%} in {domain}" for domain in result["domains"])
    return (
        f"Bits per byte are of the {compared['average']:.0%} of the text of which every source's aligned rows say "
        f"something ({of}). `fuselm fidelity` says what an align.method loses; span loses least."
    )


def lacking(result: Mapping) -> str:
    """Say which sources do not spell the text, and where they are left out."""
    parts = [
        f"{name} {share:.1%} of {domain}"
        for name, of in result.get("unspelled", {}).items()
        for domain, share in of.items()
    ]
    if not parts:
        return ""
    return (
        f"Bytes that a source's tokenizer cannot spell: {', '.join(parts)}. It says nothing of them; where they are "
        f"more than {COMPARABLE:.0%} it is not compared (∞), unless nobody spells more."
    )


def table(result: Mapping) -> Group:
    """Bits per byte of sources, ways and the oracle; who wins; the verdict."""
    columns = [*result["domains"], "average"]
    bits = Table("", *columns, "expected", box=box.SIMPLE, show_edge=False, padding=0, title_justify="left")
    bits.title = Text("bits per byte of the training documents; lower is better", style="bold")
    for column in bits.columns[1:]:
        column.justify = "right"
    rows = {**result["sources"], **result["ways"], ORACLE: result["oracle"]}
    ends = {list(result["sources"])[-1], list(result["ways"])[-1]}
    for name, row in rows.items():
        label = f"{name} (the target)" if name == result["target"] else name
        cells = [_best(row["bits_per_byte"][c], [r["bits_per_byte"][c] for r in _group(result, name)]) for c in columns]
        bits.add_row(plain(label), *cells, _best(row["expected"]["average"], []), end_section=name in ends)
    wins = Table("", *result["domains"], box=box.SIMPLE, show_edge=False, padding=0, title_justify="left")
    wins.title = Text("predicted best: share of tokens, of documents", style="bold")
    for column in wins.columns[1:]:
        column.justify = "right"
    for name in result["sources"]:
        cells = [
            f"{result['wins'][d]['tokens'][name]:.0%}, {result['wins'][d]['documents'][name]:.0%}"
            for d in result["domains"]
        ]
        wins.add_row(plain(name), *cells)
    agreement = [
        plain(
            f"{' and '.join(pair['sources'])}: the same first token at {pair['same_first']:.0%} of positions, "
            f"{pair['overlap']:.0%} of the probability in common"
        )
        for pair in result["agreement"]
    ]
    notes = [
        plain(note, style="dim") for note in (partly(result), lacking(result), DRAWN if result["drawn"] else "") if note
    ]
    verdict = [plain(line, style="bold") for line in result["verdict"]]
    return Group(bits, Text(), *notes, *([Text()] if notes else []), wins, Text(), *agreement, Text(), *verdict)


def _group(result: Mapping, name: str) -> list[Mapping]:
    group = next((result[kind] for kind in ("sources", "ways") if name in result[kind]), {})
    return list(group.values())


def _best(value: float | None, others: Sequence[float | None]) -> Text:
    if value is None:
        return Text("∞")
    best = others and value == min(v for v in others if v is not None)
    return Text(f"{value:.3f}", style="bold green" if best else "")
