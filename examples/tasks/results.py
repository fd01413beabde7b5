"""Show what models answered as numbers and tables; answers of two models to the same questions are compared in pairs.

A model's numbers are lm-eval's, with its standard errors, which take questions for independent; a cloze's perplexity is
told as bits a word. Differences have 95% intervals of a bootstrap over documents, for questions about one document are
not independent, and the exact test of McNemar on the questions that only one of the two has right.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from fuselm.results.bootstrap import Bootstrap
from fuselm.results.pages.formats import format_interval
from fuselm.results.scoring import Score

METRICS = {"cloze": ("acc", "bits"), "continuation": ("acc", "acc_norm")}
TITLES = {"acc": "% right", "acc_norm": "% right by probability per character", "bits": "bits a word"}
PAIRS = (("fused", "clm"), ("fused", "base"), ("clm", "base"))

Tasks = Mapping[str, tuple[str, str]]  # of the name of a task its kind and domain
Answers = Mapping[str, Mapping]  # of a task `values`, which are lm-eval's, and `items`, a row for each question


def summarize(answers: Mapping[str, Answers], tasks: Tasks) -> dict:
    """Return the numbers of each model by name, and the differences between those of base, clm and fused that exist."""
    kinds = [kind for kind in METRICS if kind in (of for of, _ in tasks.values())]
    pairs = [(a, b) for a, b in PAIRS if a in answers and b in answers]
    return {
        "models": {name: {kind: _numbers(of, tasks, kind) for kind in kinds} for name, of in answers.items()},
        "differences": {
            f"{a}-{b}": {
                kind: {m: _difference(answers[a], answers[b], tasks, kind, m) for m in METRICS[kind]} for kind in kinds
            }
            for a, b in pairs
        },
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided probability that questions which could be either's are split as unevenly as this."""
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1)) / 2**count
    return min(1.0, 2 * tail)


def _numbers(answers: Answers, tasks: Tasks, kind: str) -> dict:
    """Return values by domain, and their mean."""
    domains = {}
    for task, (of_kind, domain) in tasks.items():
        if of_kind == kind:
            of = answers[task]
            domains[domain] = {**of["values"], "items": len(of["items"])}
            if "bits" in METRICS[kind]:
                bits = [_value(item, "bits") for item in of["items"]]
                error = statistics.stdev(bits) / math.sqrt(len(bits))
                domains[domain] |= {"bits": statistics.fmean(bits), "bits_stderr": error}
    average = {}
    for metric in METRICS[kind]:
        average[metric] = statistics.fmean(of[metric] for of in domains.values())
        average[f"{metric}_stderr"] = math.hypot(*(of[f"{metric}_stderr"] for of in domains.values())) / len(domains)
    return {"domains": domains, "average": average}


def _value(item: Mapping, metric: str) -> float:
    """Return the value of one question; lm-eval calls the natural log-probability of a word its `perplexity`."""
    return -item["perplexity"] / math.log(2) if metric == "bits" else item[metric]


def _difference(first: Answers, second: Answers, tasks: Tasks, kind: str, metric: str) -> dict:
    """Return first minus second, by domain and on average."""
    domains = {domain: task for task, (of_kind, domain) in tasks.items() if of_kind == kind}
    scores = [_scores(answers, domains, metric) for answers in (first, second)]
    cells = {
        name: {"value": i.value, "low": i.low, "high": i.high}
        for name, i in Bootstrap(scores[0]).find_intervals(*scores).items()
    }
    if metric != "bits":
        only = {d: _only(first[task]["items"], second[task]["items"], metric) for d, task in domains.items()}
        only["average"] = tuple(map(sum, zip(*only.values(), strict=True)))
        for name, (one, other) in only.items():
            cells[name] |= {"only_first": one, "only_second": other, "p": mcnemar(one, other)}
    return {"domains": {n: c for n, c in cells.items() if n != "average"}, "average": cells["average"]}


def _scores(answers: Answers, domains: Mapping[str, str], metric: str) -> list[Score]:
    """Return for each document the sum over its questions, with their number in the place of bytes."""
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for domain, task in domains.items():
        for item in answers[task]["items"]:
            total, count = sums.get((domain, item["document"]), (0.0, 0))
            sums[domain, item["document"]] = (total + _value(item, metric), count + 1)
    return [Score(document=d, domain=of, bits=total, bytes=count) for (of, d), (total, count) in sums.items()]


def _only(first: Sequence[Mapping], second: Sequence[Mapping], metric: str) -> tuple[int, int]:
    """Count the questions that only the first has right, and those that only the second has."""
    pairs = [(a[metric], b[metric]) for a, b in zip(first, second, strict=True)]
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def page(summary: Mapping) -> str:
    """Return the numbers as Markdown tables."""
    kinds = next(iter(summary["models"].values()))
    return "\n".join(_table(summary, kind, metric) for kind in kinds for metric in METRICS[kind])


def _table(summary: Mapping, kind: str, metric: str) -> str:
    factor, digits = (1, 3) if metric == "bits" else (100, 1)
    models = {name: numbers[kind] for name, numbers in summary["models"].items()}
    domains = list(next(iter(models.values()))["domains"])

    def number(of: Mapping) -> str:
        return f"{of[metric] * factor:.{digits}f} ± {of[f'{metric}_stderr'] * factor:.{digits}f}"

    def difference(of: Mapping) -> str:
        def form(value: float) -> str:
            return f"{value * factor:+.{digits}f}".replace("-", "−")

        test = f"; {of['only_first']} : {of['only_second']}, p = {of['p']:.2g}" if "p" in of else ""
        return f"{form(of['value'])} {format_interval(of, form)}{test}"

    rows = [["", *(domain.replace("_", " ") for domain in domains), "average"]]
    rows.append(["---"] * len(rows[0]))
    rows += [[name, *map(number, [*of["domains"].values(), of["average"]])] for name, of in models.items()]
    for pair, of in summary["differences"].items():
        cells = of[kind][metric]
        columns = [*(cells["domains"][domain] for domain in domains), cells["average"]]
        rows.append([pair.replace("-", " − "), *map(difference, columns)])
    return f"### {kind}, {TITLES[metric]}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
