"""Gather every number of a run from the folders of its stages."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from fuselm.fusion.choices import SAMPLE
from fuselm.results.bootstrap import summarize_scores
from fuselm.results.json_numbers import replace_nonfinite
from fuselm.results.scoring import Score
from fuselm.results.tasks.summary import summarize_answers
from fuselm.results.verdicts import TARGETS
from fuselm.system import manifest
from fuselm.system.public_names import name_options_publicly

OWN_FOLDERS = ("output", "store_dir")  # options that say where results are, and change none
Folders = Mapping[str, Any]  # the folder of each stage, or its folders by source, method or model


def summarize_run(options: Mapping[str, Any], folders: Folders) -> dict[str, Any]:
    """Return every number of a run, from its options by section and the folders of its stages.

    A number that is not finite, such as the fidelity of a method that gave the text no probability, is None.
    """
    summary = summarize_evaluations(folders["evaluate"]) | {
        "corpus": _summarize_corpus(folders),
        "written": {name: manifest.read(path)["counts"] for name, path in folders["write"].items()},
        "training": {method: _summarize_training(path) for method, path in folders["train"].items()},
        **({"merge": _summarize_merge(folders["merge"][""])} if folders.get("merge") else {}),
        **({"tasks": summarize_answers(folders["tasks"])} if folders.get("tasks") else {}),
        "alignment": {name: manifest.read(path)["counts"]["fidelity"] for name, path in folders["align"].items()},
        "fusion": _name_sample(_summarize_fusion(folders["fuse"]), folders["align"]),
        "stages": _collect_seconds(folders),
        "config": select_public_options(options),
        "version": metadata.version("fuselm"),
    }
    return replace_nonfinite(summary)


def summarize_evaluations(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return `models`, `differences` and `heldout` of a summary, from the folders with every model's scores."""
    scores = {
        name: [Score(**row) for row in manifest.read_json(path / "scores.json")] for name, path in folders.items()
    }
    scores = {name: scores[name] for name in [*(n for n in scores if n not in TARGETS), *TARGETS]}
    pairs = [("fused", "clm"), ("fused", "base"), ("clm", "base"), *(("fused", n) for n in scores if n not in TARGETS)]
    return summarize_scores(scores, pairs) | {"heldout": _count_heldout(scores["base"])}


def summarize_measurements(scored: Mapping[str, Path], asked: Mapping[str, Path]) -> dict[str, Any]:
    """Return what `summarize_evaluations` does, and `tasks` if there are any."""
    return summarize_evaluations(scored) | ({"tasks": summarize_answers(asked)} if asked else {})


def select_public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run without its own folders, paths and addresses of servers."""
    return name_options_publicly({name: value for name, value in options.items() if name not in OWN_FOLDERS})


def _summarize_corpus(folders: Folders) -> dict:
    """Return the counts of the texts, with the tokens counted for each group of models that share a tokenizer."""
    counts = {"repeated": 0} | manifest.read(folders["corpus"])["counts"]  # older runs did not count them
    readers: dict[str, list[str]] = {}
    for name, path in folders["evaluate"].items():
        if name not in TARGETS[1:]:
            tokenizer = manifest.read(path)["inputs"]["tokenizer"]
            readers.setdefault(tokenizer, []).append("target" if name == "base" else name)
    by_reader = [name for name in ("tokens", "unspelled") if name in counts]
    return counts | {
        name: {", ".join(readers[t]): of for t, of in counts[name].items() if t in readers} for name in by_reader
    }


def _summarize_fusion(folders: Path | Mapping[str, Path]) -> dict[str, Any]:
    """Return how rows were fused, each source's share and the rows' bits per byte, by domain.

    With a copy of the target for each source, these are means over the copies, and `copies` has those of each.
    """
    stores = {"": folders} if isinstance(folders, Path) else folders
    records = {name: manifest.read(folder) for name, folder in stores.items()}
    each = {name: _summarize_store(record["counts"]) for name, record in records.items()}
    way = _describe_fusion(next(iter(records.values()))["parameters"])
    if isinstance(folders, Path):
        return {"way": way, **each[""]}
    sources = list(dict.fromkeys(n for of in each.values() for shares in of["shares"].values() for n in shares))
    domains = next(iter(each.values()))["bits_per_byte"]
    return {
        "way": f"{way}, each source for a copy of the target",
        "shares": {
            domain: {n: mean(of["shares"][domain].get(n, 0.0) for of in each.values()) for n in sources}
            for domain in domains
        },
        "bits_per_byte": {domain: mean(of["bits_per_byte"][domain] for of in each.values()) for domain in domains},
        "copies": each,
    }


def _name_sample(fusion: dict[str, Any], aligned: Mapping[str, Path]) -> dict[str, Any]:
    """Say of how many documents the numbers are, if training fuses what it reads (`fuse.when: load`)."""
    records = [manifest.read(path) for path in aligned.values()]
    if not any(SAMPLE in record["parameters"] for record in records):
        return fusion
    count = min(record["counts"]["documents"] for record in records)
    return fusion | {"way": f"{fusion['way']}, when training reads; numbers are of a sample of {count:,} documents"}


def _summarize_store(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "shares": {d: dict(zip(counts["sources"], values, strict=True)) for d, values in counts["shares"].items()},
        "bits_per_byte": counts["bits_per_byte"],
    }


def _summarize_merge(folder: Path) -> dict[str, Any]:
    """Return how the fused model was merged, and bits per byte of the development split: its own, and each model's."""
    record = manifest.read(folder)
    return {
        "method": record["parameters"]["method"],
        "parameters": record["parameters"]["parameters"],
        "by_model": record["parameters"].get("by_model", {}),
        "models": [name.removeprefix("model ") for name in record["inputs"] if name.startswith("model ")],
        "dev_bits_per_byte": record["counts"]["dev_bits_per_byte"],
        "trained_dev_bits_per_byte": record["counts"]["models"],
    }


def _describe_fusion(parameters: Mapping[str, Any]) -> str:
    """Describe how the rows of all sources were fused."""
    function = parameters["function"]
    level = "" if function in ("fixed", "bayes") else f" per {parameters['level']}"
    learned = ", weights learned by domain" if parameters["weights"] == "learned" else ""
    return f"{function}{level}{learned}"


def _count_heldout(scores: Sequence[Score]) -> dict[str, dict[str, int]]:
    domains = sorted({s.domain for s in scores})
    members = {d: [s for s in scores if s.domain == d] for d in domains}
    return {d: {"documents": len(ss), "bytes": sum(s.bytes for s in ss)} for d, ss in members.items()}


def _summarize_training(folder: Path) -> dict:
    record = manifest.read(folder)
    names = ("learning_rate", "lr_schedule", "passes", "average", "lambda_clm", "lambda_final", "precision")
    settings = {n: record["parameters"][n] for n in names}
    counts = {n: record["counts"][n] for n in ("steps", "best_step", "dev_bits_per_byte", "tokens", "text_tokens")}
    planned = record["counts"].get("planned_steps", counts["steps"])  # older folders do not have it
    if counts["best_step"] < planned * settings["average"] / settings["passes"]:
        settings["average"] = False  # the kept checkpoint is older than the first averaged step
    return settings | counts


def _collect_seconds(folders: Folders) -> dict[str, float]:
    """Return the seconds of each stage. A folder that two models share counts once, a deleted one does not count."""
    seconds: dict[Path, tuple[str, float]] = {}
    for stage, paths in folders.items():
        for name, path in paths.items() if isinstance(paths, dict) else [("", paths)]:
            if manifest.is_finished(path):
                seconds.setdefault(path, (f"{stage} {name}".strip(), float(manifest.read(path)["seconds"])))
    return dict(seconds.values())
