"""Test that the script of the screenshots makes an image of every page that it is given."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from page_runs import pages
from PIL import Image

__all__ = ["pages"]  # a fixture
SCRIPT = Path(__file__).parents[2] / "docs/screenshots.py"


@pytest.fixture
def run_script(monkeypatch):
    """Return a function that runs the script with arguments."""
    spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["screenshots.py", *map(str, arguments)])
        module.main()

    return run, module


def test_every_page_has_its_image(run_script, pages, tmp_path):
    run, module = run_script
    try:
        module.find_chromium()
    except ValueError as error:
        pytest.skip(str(error))
    named = [part for name in ("diagnosis", "fidelity", "study") for part in (f"--{name}", pages[name])]
    run(pages["report"].parent, *named, "--out", tmp_path / "images")
    images = {path.name: read_image(path) for path in (tmp_path / "images").iterdir()}
    assert set(images) == {
        f"{name}.png" for name in ("report", "diagnosis", "fidelity", "study", "report-phone", "tokens")
    }
    assert images["report.png"].shape == (820, 1200) and images["report-phone.png"].shape == (820, 400)
    assert all(len(np.unique(image)) > 10 for image in images.values())  # none is blank


def read_image(path: Path) -> np.ndarray:
    """Return the greys of an image, rows by columns."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def test_a_page_that_is_not_there_is_named(run_script, tmp_path):
    run, _ = run_script
    with pytest.raises(SystemExit, match=r"^screenshots: no file .*report\.html; name pages that are there$"):
        run(tmp_path)
