"""Write a run's results: `summary.json`, one self-contained HTML page, and the model card.

Everything that is shown is in `summary.json`, except for the training curves and the tokens. Two runs of the same
options differ only in `stages`, the seconds of each stage.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselm.results.pages.report_page import render_model_card, render_page
from fuselm.results.run_summary import Folders, summarize_run
from fuselm.system import atomic_files, manifest
from fuselm.system.foreign_text import write_json

VERSION = 5


def write_report(
    out: Path, options: Mapping[str, Any], folders: Folders, token_rows: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Write `summary.json`, `report.html` and the model card `README.md`; return the counts for the manifest.

    `options` are those of the run, by section; `folders` are those of all its stages. `token_rows` are what the
    token view of the page shows, of `token_rows.gather_token_rows`.
    """
    summary = summarize_run(options, folders)
    histories = {m: manifest.read_json(path / "history.json") for m, path in folders["train"].items()}
    atomic_files.write_text(out / "summary.json", write_json(summary, indent=1) + "\n")
    atomic_files.write_text(out / "report.html", render_page(summary, histories, token_rows))
    atomic_files.write_text(out / "README.md", render_model_card(summary))
    return {"models": len(summary["models"]), "heldout": sum(d["documents"] for d in summary["heldout"].values())}
