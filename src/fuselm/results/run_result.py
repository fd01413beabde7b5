"""Read what a finished run measured, as objects and flat rows for tables."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from fuselm.results.pages.results_table import draw_results
from fuselm.system import manifest
from fuselm.system.remote_paths import open_path
from fuselm.system.terminal import open_console


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Hold what a finished run measured, and where its files are.

    `summary` is what `summary.json` holds. `scores` and `differences` give its main numbers as flat rows, one for each
    model and domain, which table libraries take as they are: `pandas.DataFrame(result.scores)`.

    >>> result = fuselm.load_result("runs/mine")
    >>> sorted({row["model"] for row in result.scores})
    ['base', 'clm', 'fused', 'other']
    >>> [row for row in result.differences if row["minus"] == "clm"][-1]["domain"]
    'average'
    >>> result.model.is_dir(), result.report.name
    (True, 'report.html')
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        """Return the folder of the fused model; `AutoModelForCausalLM.from_pretrained` loads it."""
        return self.folder / "model"

    @property
    def report(self) -> Path:
        """Return the path of the run's page."""
        return self.folder / "report.html"

    @property
    def scores(self) -> list[dict[str, Any]]:
        """Return rows of `model`, `domain`, `bits_per_byte`, and its 95 % interval from `low` to `high`.

        Scores are of held-out text, and less is better. An interval is None where a domain has too few documents.
        """
        return [
            {"model": name} | row for name, cells in self.summary["models"].items() for row in _flatten_cells(cells)
        ]

    @property
    def differences(self) -> list[dict[str, Any]]:
        """Return rows of `model`, `minus`, `domain`, the `value` in bits per byte, and its 95 % interval.

        A value below zero says that `model` is better than `minus`.
        """
        pairs = {pair: pair.split("-", 1) for pair in self.summary["differences"]}
        return [
            {"model": model, "minus": minus} | row
            for pair, (model, minus) in pairs.items()
            for row in _flatten_cells(self.summary["differences"][pair])
        ]

    def __repr__(self) -> str:
        average = self.summary["models"]["fused"]["average"]["bits_per_byte"]
        return f"RunResult({str(self.folder)!r}, fused: {average:.4f} bits per byte on average)"

    def __str__(self) -> str:
        """Return the table that `fuselm run` ends with."""
        text = StringIO()
        open_console(file=text).print(draw_results(self.summary))
        return text.getvalue()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def load_result(folder: str | Path) -> RunResult:
    """Read the result that a finished run left in `folder`.

    Raises:
        ValueError: If no finished run is there.

    >>> print(fuselm.load_result("runs/mine").summary["version"])
    0.1.0
    """
    path = open_path(folder) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no finished run there (it has no summary.json); run its run file first")
    return RunResult(folder=path.parent, summary=manifest.read_json(path, drop=path))


def _flatten_cells(cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    domains = cells["domains"] | {"average": cells["average"]}
    return [{"domain": domain, **cell} for domain, cell in domains.items()]
