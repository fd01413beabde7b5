"""Write docs/results.md, docs/parts.md and docs/pruning.md with their figures from what experiments left in a folder.

`make results` runs the experiments first.

    python benchmarks/results.py [RUNS]

Takes RUNS/study, RUNS/study-tokens, RUNS/study-parts, RUNS/study-pairwise, RUNS/study-prune, RUNS/study-tasks,
RUNS/study-baseline, RUNS/study-controls and RUNS/study-second-target (`fuselm study`), and RUNS/apart.json,
RUNS/peers.json and RUNS/training.json (the benchmarks of these names with `--json`). Where something is not there, the
page's section stays as it is, or says so; a page of which nothing is there stays as it is.
"""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fuselm.results.pages.formats import format_interval, format_signed
from fuselm.system import atomic_files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COLUMNS = 100
ABSENT = "` has not been run."  # ends what a section says without its experiment


def read(path: Path) -> dict | None:
    """Read what a benchmark printed."""
    return json.loads(path.read_text()) if path.is_file() else None


def study(folder: Path) -> str | None:
    """Return a study's page as a section of this one, with its figures copied to where its links point."""
    if not (page := folder / "results.md").is_file():
        return None
    text = page.read_text()
    figures = DOCS / "figures" / folder.name
    figures.mkdir(parents=True, exist_ok=True)
    for figure in re.findall(r"\]\(figures/(.*?)\)", text):
        shutil.copy(folder / "figures" / figure, figures)
    text = text.replace("](figures/", f"](figures/{folder.name}/").replace("`fuselm study ", "`fuselm study examples/")
    return re.sub(r"^(?=#)", "#", re.sub(r"^# .*\n+", "", text), flags=re.MULTILINE).strip()


def wrap(page: str) -> str:
    """Break lines at 100 columns where a study's page has longer ones; tables and headings stay whole."""
    lines = []
    for line in page.splitlines():
        is_whole = len(line) <= COLUMNS or line.startswith(("|", "#"))
        indent = "  " if line.startswith("- ") else ""
        kept = {"break_long_words": False, "break_on_hyphens": False}
        lines += [line] if is_whole else textwrap.wrap(line, COLUMNS, subsequent_indent=indent, **kept)
    return "\n".join(lines)


def keep_sections(made: str, before: str) -> str:
    """Return the page with those sections of before whose experiment is not there, if they had any numbers."""
    known = dict(split_sections(before))
    kept = {n: known[n] for n, text in split_sections(made) if ABSENT in text and ABSENT not in known.get(n, ABSENT)}
    return "".join(kept.get(name, text) for name, text in split_sections(made))


def split_sections(page: str) -> list[tuple[str, str]]:
    """Return the headings of the page's sections with the text of each; what precedes the first has none."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    return [(part.partition("\n")[0] if part.startswith("## ") else "", part) for part in parts]


def tasks(page: Path) -> str | None:
    """Return the tables of tasks, one level of headings lower."""
    return re.sub(r"^###(?= )", "####", page.read_text().strip(), flags=re.MULTILINE) if page.is_file() else None


def minus(pair: str, models: Collection[str]) -> str:
    """Split a difference's name into two models, whose names may have dashes too."""
    first = next(name for name in models if pair.startswith(f"{name}-") and pair.removeprefix(f"{name}-") in models)
    return f"{first} − {pair.removeprefix(f'{first}-')}"


def bits(cell: Mapping[str, float]) -> str:
    return f"{cell['bits_per_byte']:.4f}"


def difference(cell: Mapping[str, float]) -> str:
    return f"{format_signed(cell['value'])} {format_interval(cell, format_signed)}"


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    of_pages = {
        "results": {
            "study": study(runs / "study"),
            "tokens": study(runs / "study-tokens"),
            "pairwise": study(runs / "study-pairwise"),
            "baseline": study(runs / "study-baseline"),
            "controls": study(runs / "study-controls"),
            "second": study(runs / "study-second-target"),
            "tasks": study(runs / "study-tasks"),
            "earlier_tasks": tasks(runs / "full/tasks/results.md"),
            "apart": read(runs / "apart.json"),
            "peers": read(runs / "peers.json"),
            "training": read(runs / "training.json"),
        },
        "parts": {"parts": study(runs / "study-parts")},
        "pruning": {"recovery": study(runs / "study-prune")},
    }
    if not any(of for found in of_pages.values() for of in found.values()):
        sys.exit(f"results: nothing of an experiment in {runs}; `make results` runs them")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bits": bits, "difference": difference, "minus": minus}
    for name, found in of_pages.items():
        page = DOCS / f"{name}.md"
        absent = [part for part, of in found.items() if of is None]
        if len(absent) == len(found):
            print(f"{page}: as it was, for nothing of it is in {runs}")
            continue
        made = wrap(environment.get_template(f"{name}.md.jinja").render(found)) + "\n"
        before = page.read_text(encoding="utf-8") if page.is_file() else ""
        atomic_files.write_text(page, keep_sections(made, before))
        print(f"{page}{': without ' + ', '.join(absent) if absent else ''}")


if __name__ == "__main__":
    main()
