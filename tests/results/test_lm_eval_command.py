"""The command of lm-eval itself gives the same answer to each question, on a real model."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_run import QUIET

from fuselm.models.locating import locate_model
from fuselm.results.tasks import asking, catalogue

TASKS, LIMIT = ("minimal_pairs_english", "copying_words"), 200


@pytest.mark.slow
@pytest.mark.real
def test_each_answer_is_that_of_lm_evals_own_command(tmp_path, real_models, monkeypatch):
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")  # as looking for a model does; it is taken back
    model = locate_model(str(real_models["smollm2"]))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--limit", f"{LIMIT}", "--log_samples"]
    command += ["--model_args", f"pretrained={model.folder},dtype=float32", "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(catalogue.SUITES), "--output_path", str(tmp_path), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    found = catalogue.find_tasks(list(TASKS), limit=LIMIT)
    options = {"dtype": "float32", "batch_tokens": 1024, "limit": LIMIT, "chat_template": False, "run_code": False}
    rows, _ = asking.ask_model(model, found.tasks, progress=QUIET, **options)
    for task in TASKS:
        (path,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        theirs = {s["doc_id"]: s for s in map(json.loads, path.read_text().splitlines())}
        ours = {(r["question"], r["metric"]): r for r in rows if r["task"] == task}
        assert {question for question, _ in ours} == set(theirs) == set(range(LIMIT))
        bits = np.array([[ours[n, "bits"]["value"], theirs[n]["bits"]] for n in theirs])
        right = [(ours[n, "acc"]["value"], theirs[n]["acc"]) for n in theirs]
        same = sum(a == b for a, b in right)
        print(f"{task}: {same} of {LIMIT} the same, bits differ by {np.ptp(bits, 1).max():.2e}")
        np.testing.assert_allclose(bits[:, 0], bits[:, 1], rtol=1e-4, atol=1e-4)
        assert same >= LIMIT - 1  # equal logits may be sorted either way
