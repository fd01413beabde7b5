"""Compare every causal architecture of the installed transformers with plain transformers; write docs/architectures.md.

python benchmarks/breadth.py            # all of them, some minutes on one core
python benchmarks/breadth.py llama rwkv # some
python benchmarks/breadth.py --write    # all of them, and the table in docs/architectures.md
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "breadth"))

import architectures  # noqa: E402
import checks  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types and variants; all of them without any")
    parser.add_argument("--write", action="store_true", help="put the table into docs/architectures.md")
    options = parser.parse_args(arguments)
    if options.write and options.names:
        parser.error("--write needs all architectures; leave the names out")
    torch.set_num_threads(1)
    outcomes = examine_all(options.names or architectures.names())
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{table(outcomes)}{END}{rest.split(END)[1]}", encoding="utf-8")
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
        print(row_of(outcomes[-1]), *outcomes[-1].faults, sep="\n    ", flush=True)
    return outcomes


def table(outcomes: Sequence[checks.Outcome]) -> str:
    """Return the outcomes as a Markdown table, with their counts and versions."""
    unusable = (checks.NOT_BUILT, checks.REFUSED)
    used = sum(outcome.source not in unusable and not outcome.faults for outcome in outcomes)
    refused = sum(outcome.source == checks.REFUSED and not outcome.faults for outcome in outcomes)
    faulty = sum(bool(outcome.faults) for outcome in outcomes)
    built = sum(outcome.source != checks.NOT_BUILT for outcome in outcomes)
    return (
        f"With transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}: {len(outcomes)} "
        f"architectures and variants,\n{built} built; {used} equal plain transformers in all three columns, {refused} "
        f"are rightly refused, {faulty} have a fault.\n\n"
        "| architecture | source | target | product | note |\n|---|---|---|---|---|\n"
        + "".join(f"{row_of(outcome)}\n" for outcome in outcomes)
    )


def row_of(outcome: checks.Outcome) -> str:
    note = "; ".join(part for part in ("; ".join(outcome.faults), outcome.note) if part).replace("|", "/")
    return f"| `{outcome.name}` | {outcome.source} | {outcome.target} | {outcome.product} | {note} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
