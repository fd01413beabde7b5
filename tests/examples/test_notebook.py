"""examples/fuse_in_python.ipynb from beginning to end, on the demo's models and a few documents."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "fuse_in_python.ipynb"


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs_and_shows_figures(real_models, tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    root = NOTEBOOK.parents[1]
    for cell in notebook.cells:
        assert not cell.get("outputs"), "the notebook is kept without outputs"
        cell.source = cell.source.replace('Path("runs/notebook")', f"Path({str(tmp_path)!r})")
        cell.source = cell.source.replace("DOCUMENTS = 10", "DOCUMENTS = 5")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(root)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("fused" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert (tmp_path / "model" / "config.json").is_file() and (tmp_path / "report.html").is_file()
