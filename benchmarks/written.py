"""Compare what sources wrote with held-out text, word by word: `python benchmarks/written.py RUN [--json]`.

RUN is the folder of a run with `write.ratio`. A source may have read public pages in its training and write them from
memory, held-out text among them. For each domain the table has the share of the held-out text's runs of eight words
that are in what sources wrote, the same of the training text, for comparison, and the longest run of words that
written and held-out text share. Letter case and punctuation do not count.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fuselm.documents.document_list import read_documents
from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import write
from fuselm.system import manifest

WORDS = 8  # of a run
_WORD = re.compile(r"\w+")


def split_words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def list_runs(words: Sequence[str], size: int = WORDS) -> list[tuple[str, ...]]:
    """Return all runs of `size` neighbouring words."""
    return [tuple(words[n : n + size]) for n in range(len(words) - size + 1)]


def collect_runs(texts: Iterable[Sequence[str]], size: int = WORDS) -> set[tuple[str, ...]]:
    return {run for words in texts for run in list_runs(words, size)}


def compute_share(heldout: Sequence[Sequence[str]], known: set[tuple[str, ...]]) -> float:
    """Return the share of the runs of held-out texts that are known."""
    runs = [run for words in heldout for run in list_runs(words)]
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def find_longest(heldout: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> str:
    """Return the longest run of words that texts of both kinds have."""
    longest: tuple[str, ...] = ()
    while True:
        size = len(longest) + 1
        shared = sorted(collect_runs(heldout, size) & collect_runs(others, size))
        if not shared:
            return " ".join(longest)
        longest = shared[0]


def compare_texts(heldout: Sequence[str], train: Sequence[str], written: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of one domain."""
    held, trained, made = ([split_words(text) for text in texts] for texts in (heldout, train, written))
    longest = find_longest(held, made)
    known = collect_runs(made)
    return {
        "heldout_runs": sum(len(list_runs(words)) for words in held),
        "written_words": sum(map(len, made)),
        "in_written": compute_share(held, known),
        "in_train": compute_share(held, collect_runs(trained)),
        "documents": sum(any(run in known for run in list_runs(words)) for words in held),
        "longest_words": len(longest.split()),
        "longest": longest,
    }


def compare_run(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the numbers by domain. Raises `ValueError` if nothing was written."""
    pipeline = Pipeline(config.load(folder / "config.yaml"), Console(quiet=True))
    folders = [path for path in write.declare(pipeline).values() if manifest.is_finished(path)]
    if not folders:
        raise ValueError(f"{folder}: no source has written anything; set write.ratio, and run `fuselm write`")
    written = [(d.domain, d.text) for path in folders for d in read_documents(path)]
    of_split = {s: [(d.domain, d.text) for d in pipeline.documents.select(s)] for s in ("heldout", "train")}
    groups = (of_split["heldout"], of_split["train"], written)
    domains = sorted({domain for domain, _ in written})
    return {
        name: compare_texts(*([text for domain, text in of if domain == name] for of in groups)) for name in domains
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        found = compare_run(arguments.run)
    except (OSError, ValueError) as error:
        sys.exit(f"written: {error}")
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print("| | words written | held-out runs of 8 | in written | in training text | documents with one | longest |")
    print("|---|---|---|---|---|---|---|")
    for name, of in found.items():
        shares = f"{of['in_written']:.2%} | {of['in_train']:.2%}"
        longest = f"{of['longest_words']}: {of['longest']}"
        print(
            f"| {name} | {of['written_words']:,} | {of['heldout_runs']:,} | {shares} | {of['documents']} | {longest} |"
        )


if __name__ == "__main__":
    main()
