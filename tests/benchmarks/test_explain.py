"""benchmarks/explain.py: figures are drawn from a run's stores, and say what the stores say."""

import math
import xml.etree.ElementTree as ElementTree

import explain
import pytest
import tiny_run

import fuselm
from fuselm.system import manifest


def test_figures_show_a_document_of_a_run(tmp_path, byte_level, sentence_piece, texts, capsys):
    sources = {"own": byte_level, "other": sentence_piece}
    run_file = tiny_run.write(tmp_path, target=byte_level, sources=sources, rows=tiny_run.short(texts))
    assert tiny_run.fuselm("fuse", run_file).code == 0
    run = fuselm.load_run(run_file, quiet=True)
    document, whole = next(iter(run.texts().items()))
    word = " " + whole.split()[3]
    out = tmp_path / "figures"
    explain.main([str(run.folder), "--out", str(out), "--document", document, "--word", word])
    figures = {path.stem: "".join(ElementTree.parse(path).getroot().itertext()) for path in out.glob("*.svg")}
    assert set(figures) == {"fusion", "capture", "align", "weights"}
    assert {line.rpartition("/")[2] for line in capsys.readouterr().out.split()} == {f"{n}.svg" for n in figures}
    trace = run.align()["other"].read(document)
    shown, first, end = explain.split_words(trace, whole.encode())[0]
    assert whole.startswith(shown)
    assert f"{-trace.distributions.gold[first:end].sum() / math.log(2):.1f}" in figures["fusion"]
    assert word.strip() in figures["fusion"] and "drawn from the tail" in figures["capture"]
    assert "own" in figures["align"] and "other" in figures["align"]
    counts = manifest.read(run.fuse().folder)["counts"]
    for domain, weights in counts["weights"].items():
        assert domain in figures["weights"] and f"{max(weights):.2f}" in figures["weights"]
    with pytest.raises(SystemExit, match="nowhere: no such training document"):
        explain.main([str(run.folder), "--document", "nowhere"])
