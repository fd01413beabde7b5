"""Gather every number of a run from the folders of its stages."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fuselm.results.bootstrap import summarize_scores
from fuselm.results.json_numbers import replace_nonfinite
from fuselm.results.scoring import Score
from fuselm.results.verdicts import TARGETS
from fuselm.system import manifest
from fuselm.system.public_names import name_options_publicly

OWN_FOLDERS = ("output", "store_dir")  # options that say where results are, and change none
Folders = Mapping[str, Any]  # the folder of each stage, or its folders by source, method or model


def summarize_run(options: Mapping[str, Any], folders: Folders) -> dict[str, Any]:
    """Return every number of a run, from its options by section and the folders of its stages.

    A number that is not finite, such as the fidelity of a method that gave the text no probability, is None.
    """
    scores = {
        name: [Score(**row) for row in manifest.read_json(path / "scores.json")]
        for name, path in folders["evaluate"].items()
    }
    scores = {name: scores[name] for name in [*(n for n in scores if n not in TARGETS), *TARGETS]}
    pairs = [("fused", "clm"), ("fused", "base"), ("clm", "base"), *(("fused", n) for n in scores if n not in TARGETS)]
    fused = manifest.read(folders["fuse"])["counts"]
    summary = summarize_scores(scores, pairs) | {
        "heldout": _count_heldout(scores["base"]),
        "corpus": _summarize_corpus(folders),
        "written": {name: manifest.read(path)["counts"] for name, path in folders["write"].items()},
        "training": {method: _summarize_training(path) for method, path in folders["train"].items()},
        "alignment": {name: manifest.read(path)["counts"]["fidelity"] for name, path in folders["align"].items()},
        "fusion": {
            "way": _describe_fusion(manifest.read(folders["fuse"])["parameters"]),
            "shares": {d: dict(zip(fused["sources"], values, strict=True)) for d, values in fused["shares"].items()},
            "bits_per_byte": fused["bits_per_byte"],
        },
        "stages": _collect_seconds(folders),
        "config": select_public_options(options),
        "version": metadata.version("fuselm"),
    }
    return replace_nonfinite(summary)


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
