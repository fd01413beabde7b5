"""Compare every causal architecture of the installed transformers with plain transformers; write docs/architectures.md.

python benchmarks/breadth.py            # all of them, some minutes on one core
python benchmarks/breadth.py llama rwkv # some
python benchmarks/breadth.py --write    # all of them, and the table in docs/architectures.md
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("breadth", "support")]

import architectures  # noqa: E402
import checks  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
FAULT = "FAULT:"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types and variants; all of them without any")
    parser.add_argument("--write", action="store_true", help="put the rows into the table of docs/architectures.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(architectures.names()):
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    outcomes = examine_all(options.names or architectures.names())
    if options.write:
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        old, tail = rest.split(END)
        rows = rows_of(old) | {outcome.name: row_of(outcome) for outcome in outcomes}
        PAGE.write_text(f"{head}{BEGIN}\n{table(rows)}{END}{tail}", encoding="utf-8")
    return int(any(outcome.faults for outcome in outcomes))


def examine_all(names: Sequence[str]) -> list[checks.Outcome]:
    """Examine architectures one after the other, and print what is found."""
    lines = (ROOT / "examples" / "corpus" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = architectures.tiny_tokenizer([row["text"] for row in rows[::7]])
    documents, outcomes = checks.documents_of(rows), []
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(checks.examine(name, tokenizer, documents, Path(folder)))
        print(row_of(outcomes[-1]), flush=True)
    return outcomes


def rows_of(page: str) -> dict[str, str]:
    """Return the rows of a table of this transformers, by architecture; none if it is of another."""
    same = f"transformers {transformers.__version__} " in page
    return {m[1]: m[0] for m in re.finditer(r"^\| `([^`]+)` \|.*$", page, re.MULTILINE)} if same else {}


def table(rows: dict[str, str]) -> str:
    """Return the rows as a Markdown table, with their counts and versions."""
    lines = [rows[name] for name in architectures.names() if name in rows]
    not_built = sum(f"| {checks.NOT_BUILT} |" in line for line in lines)
    faulty = sum(FAULT in line for line in lines)
    refused = sum(line.split("|")[2].strip() == checks.REFUSED and FAULT not in line for line in lines)
    used = len(lines) - not_built - faulty - refused
    return (
        f"With transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}: {len(lines)} "
        f"architectures and variants.\n{used} equal plain transformers, {refused} are rightly refused, {not_built} are "
        f"not built, {faulty} have a fault.\n\n"
        "| architecture | source | target | product | note |\n|---|---|---|---|---|\n"
        + "".join(f"{line}\n" for line in lines)
    )


def row_of(outcome: checks.Outcome) -> str:
    notes = [*(f"{FAULT} {fault}" for fault in outcome.faults), *([outcome.note] if outcome.note else [])]
    cells = [f"`{outcome.name}`", outcome.source, outcome.target, outcome.product, "; ".join(notes).replace("|", "/")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
