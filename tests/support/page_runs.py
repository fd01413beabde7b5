"""Make every page of fuselm from one real run of tiny models."""

from pathlib import Path

import pytest
import tiny_run
import yaml
from tiny_run import fuselm


@pytest.fixture(scope="module")
def pages(tmp_path_factory, byte_level, sentence_piece, quickstart) -> dict[str, Path]:
    """Return the pages by name: those of a finished run, its diagnosis, fidelity, a study, a pruning, and a merge."""
    folder = tmp_path_factory.mktemp("pages")
    rows = [row for domain in ("french", "python") for row in quickstart if row["domain"] == domain]
    rows = tiny_run.short([row for n, row in enumerate(rows) if n % 60 < 13], length=211)
    train = tiny_run.TRAIN | {"passes": 2}
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=rows,
        train=train,
        corpus={"files": [str(folder / "corpus.jsonl")], "heldout": 0.5, "dev": 0.1},
    )
    out = folder / "out"
    study = {
        "run": run_file.name,
        "output": str(out / "study"),
        "seeds": [0],
        "arms": {"clm": {"method": "clm"}, "fused": {"method": "fused"}},
        "experiments": [
            {
                "name": "main",
                "title": "Main",
                "says": "What **fusion** adds.",
                "arms": ["base", "clm", "fused"],
                "against": "clm",
                "figures": ["bars", "steps"],
            }
        ],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    texts = folder / "corpus.jsonl"
    for arguments in (
        ("run", run_file),
        ("diagnose", out, "--report", out / "diagnosis.html"),
        (
            *("fidelity", "--source", sentence_piece, "--target", byte_level, "--texts", texts, "--sampled-tokens", 0),
            *("--method", "span", "--method", "mined", "--report", out / "fidelity.html"),
        ),
        ("study", folder / "study.yaml"),
        ("prune", byte_level, out / "pruned", "--intermediate-size", 40, "--texts", texts, "--sensitivity"),
    ):
        outcome = fuselm(*arguments)
        assert outcome.code == 0, outcome.err
    trained = [str(path) for path in sorted((out / "train").glob("*/model"))]
    (folder / "merge.yaml").write_text(yaml.safe_dump({"method": "sce", "base": str(byte_level), "models": trained}))
    outcome = fuselm("diagnose", folder / "merge.yaml", "--report", out / "apart.html")
    assert outcome.code == 0, outcome.err
    return {
        "report": out / "report.html",
        "diagnosis": out / "diagnosis.html",
        "fidelity": out / "fidelity.html",
        "study": out / "study/study.html",
        "pruning": out / "pruned/pruning.html",
        "merge": out / "apart.html",
    }
