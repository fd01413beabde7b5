"""Test precision.py and run_precision.py: the fastest type as precise as the checkpoint is chosen, and kept."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import fuselm
from transformers import AutoModelForCausalLM

from fuselm.models import precision
from fuselm.models.loading import load_model
from fuselm.models.locating import locate_model
from fuselm.runs import run_precision
from fuselm.sources import capture, resumable_writing
from fuselm.system import fingerprints, machine, manifest

WITH_BF16 = {
    "forward": {"bfloat16": 400.0, "float16": 20.0, "float32": 100.0},
    "training": {"bf16": 300.0, "float32": 90.0},
}
WITHOUT = {
    "forward": {"bfloat16": 17.0, "float16": 15.0, "float32": 46.0},
    "training": {"bf16": 9.0, "float32": 45.0},
}
NO_HALF = {"forward": {"float32": 46.0}, "training": {"float32": 45.0}}  # torch has no such products there


@pytest.fixture
def on(monkeypatch):
    """Continue on a machine on which this would be measured."""

    def change(table: dict) -> None:
        monkeypatch.setattr(precision, "measure_speeds", lambda device="auto": table)

    return change


@pytest.fixture
def in_dtype(tmp_path, byte_level):
    """Return a copy of a model in another type."""

    def make(dtype: str) -> Path:
        folder = tmp_path / dtype
        if not folder.exists():
            shutil.copytree(byte_level, folder)
            AutoModelForCausalLM.from_pretrained(byte_level, dtype=getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("table", [WITH_BF16, WITHOUT, NO_HALF])
@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
def test_no_model_is_read_in_less_than_its_checkpoint_has_and_none_slower_than_need_be(in_dtype, on, table, own):
    on(table)
    read = precision.choose_reading_dtype(locate_model(str(in_dtype(own))))
    if own == "float32":
        assert read == "auto"
    else:
        assert read in (own, "float32")
        assert table["forward"][read] == max(table["forward"].get(own, 0.0), table["forward"]["float32"])
    loaded = load_model(locate_model(str(in_dtype(own))))
    assert loaded.dtype == getattr(torch, own if read == "auto" else read)


def test_a_chosen_float32_gives_the_weights_of_an_explicit_float32(in_dtype, on):
    on(WITHOUT)
    model = locate_model(str(in_dtype("bfloat16")))
    chosen, explicit = load_model(model), load_model(model, dtype="float32")
    assert all(w.dtype == torch.float32 for w in chosen.parameters())
    for (name, w), (_, other) in zip(chosen.state_dict().items(), explicit.state_dict().items(), strict=True):
        assert torch.equal(w, other), name


@pytest.mark.parametrize(
    ("free", "dtype"),
    [(None, "float32"), (10.0, "float32"), (2.3, "float32"), (2.1, "bfloat16"), (1.2, "bfloat16"), (0.5, "float32")],
)
def test_a_model_that_fits_as_it_is_and_not_in_float32_stays_as_it_is(in_dtype, on, monkeypatch, free, dtype):
    """Check that float32 is still chosen where neither fits."""
    on(WITHOUT)
    model = locate_model(str(in_dtype("bfloat16")))
    room = None if free is None else int(free * model.parameters_bytes)
    monkeypatch.setattr(machine, "measure_available_memory", lambda: room)
    assert precision.choose_reading_dtype(model) == dtype


@pytest.mark.parametrize("where", ["dtype", "torch_dtype", "weights"])
@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
def test_the_type_of_a_checkpoint_is_what_transformers_reads_it_in(in_dtype, where, own):
    folder = in_dtype(own)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    config |= {"dtype": own} if where == "dtype" else {"torch_dtype": own} if where == "torch_dtype" else {}
    (folder / "config.json").write_text(json.dumps(config))
    assert precision.find_checkpoint_dtype(locate_model(str(folder))) == own
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert str(read) == f"torch.{own}"


def test_a_quantized_checkpoint_is_left_alone(in_dtype, on):
    folder = in_dtype("bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    on(WITHOUT)
    assert precision.choose_reading_dtype(locate_model(str(folder))) == "auto"


def test_speeds_are_measured_once_and_again_when_a_fact_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path))
    made = []

    def forward(device):
        made.append(device)
        return {"float32": 1.0 + len(made)}

    monkeypatch.setattr(precision, "_measure_forward_products", forward)
    monkeypatch.setattr(precision, "_measure_training_products", lambda device: {"float32": 1.0})
    first = precision.measure_speeds("cpu")
    assert precision.measure_speeds("cpu") == first and len(made) == 1
    for n, name in enumerate(precision.VARIABLES):
        monkeypatch.setenv(name, "AVX512_CORE")
        assert precision.measure_speeds("cpu") != first and len(made) == 2 + n, name
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "hash_processor", lambda: "another")
    assert precision.measure_speeds("cpu") != first
    monkeypatch.undo()
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path))
    assert precision.measure_speeds("cpu") == first


@pytest.mark.parametrize("damage", [None, 5, {}, {"forward": {}}, {"forward": {"float32": "fast"}, "training": {}}])
def test_a_damaged_memory_is_measured_again(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path))
    fingerprints.remember(f"precision {fingerprints.hash_lines(precision._collect_machine_facts('cpu'))}", damage)
    found = precision.measure_speeds("cpu")
    assert set(found) == {"forward", "training"} and "float32" in found["forward"]


def test_what_is_measured_are_real_products(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path))
    found = precision.measure_speeds("cpu")
    assert set(found["forward"]) <= {"bfloat16", "float16", "float32"} and set(found["training"]) <= {"bf16", "float32"}
    assert all(0 < speed < 1e6 for of in found.values() for speed in of.values())


@pytest.fixture
def run_file(tmp_path, in_dtype, sentence_piece, texts) -> Path:
    train = {name: value for name, value in tiny_run.TRAIN.items() if name != "precision"} | {"passes": 1}
    return tiny_run.write(
        tmp_path / "run",
        target=in_dtype("bfloat16"),
        sources={"own": in_dtype("bfloat16"), "other": sentence_piece},
        rows=tiny_run.short(texts),
        train=train,
    )


def counted(out: Path, stage: str, name: str) -> list[dict]:
    return [manifest.read(folder) for folder in sorted(out.glob(f"{stage}/{name}-*")) if folder.suffix != ".partial"]


def test_a_run_on_another_machine_keeps_its_precision(run_file, on):
    out = run_file.parent / "out"
    on(WITHOUT)
    assert fuselm("capture", run_file).code == 0
    begun = json.loads((out / run_precision.FILE).read_text())
    assert begun == {"source other": "auto", "source own": "float32", "target": "float32", "train": "float32"}
    on(WITH_BF16)
    outcome = fuselm("run", run_file)
    assert outcome.code == 0, outcome.err
    assert [m["parameters"]["precision"] for m in counted(out, "train", "fused")] == ["float32"]
    assert [m["counts"]["dtype"] for m in counted(out, "evaluate", "fused")] == ["float32"]
    assert fuselm("capture", run_file, "capture.draws=17").code == 0
    both = counted(out, "capture", "own")
    assert [m["counts"]["dtype"] for m in both] == ["float32", "float32"]
    assert [m["parameters"]["dtype"] for m in both] == ["auto", "auto"]
    assert json.loads((out / run_precision.FILE).read_text()) == begun
    assert "nothing to do" in fuselm("train", run_file).err
    assert "float32" in (out / "model" / "README.md").read_text()


def test_a_precision_given_in_the_run_file_counts_everywhere(run_file, on):
    out = run_file.parent / "out"
    on(WITHOUT)
    given = ["train.precision=bf16", "sources.own.dtype=bfloat16", "target.dtype=bfloat16"]
    assert fuselm("run", run_file, *given).code == 0
    assert [m["parameters"]["precision"] for m in counted(out, "train", "clm")] == ["bf16"]
    assert [m["counts"]["dtype"] for m in counted(out, "capture", "own")] == ["bfloat16"]
    assert json.loads((out / run_precision.FILE).read_text()) == {"source other": "auto"}


def test_a_run_from_before_precisions_were_chosen_keeps_its_trainings(run_file, on):
    out = run_file.parent / "out"
    on(WITH_BF16)
    assert fuselm("run", run_file, "train.precision=bf16").code == 0
    (out / run_precision.FILE).unlink()
    on(WITHOUT)
    outcome = fuselm("train", run_file)
    assert outcome.code == 0 and "nothing to do" in outcome.err


def test_plan_shows_the_choice_and_does_not_make_it(run_file, on):
    out = run_file.parent / "out"
    on(WITHOUT)
    outcome = fuselm("plan", run_file)
    shown = " ".join(outcome.out.split())
    assert outcome.code == 0 and "bfloat16 17" in shown and "trains in" in shown, outcome.err
    assert "float32 46" in shown and "threads" in shown and "source own is read in" in shown
    assert not (out / run_precision.FILE).exists()


def test_an_interrupted_capture_resumes_in_its_own_type_wherever_its_folder_is(run_file, on, monkeypatch, tmp_path):
    """Resume without the run's own record: only the folder of the stage was kept."""
    out = run_file.parent / "out"
    on(WITHOUT)
    monkeypatch.setattr(resumable_writing, "SECONDS_PER_BLOCK", 0)
    read, calls = capture.read_batch, []

    def stops(*arguments, **named):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("stopped here")
        return read(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(capture, "read_batch", stops)
        assert "stopped here" in fuselm("capture", run_file).err
    (partial,) = out.glob("capture/own-*.partial")
    assert (partial / run_precision.PARTIAL_FILE).read_text() == "float32"
    (out / run_precision.FILE).unlink()
    on(WITH_BF16)
    assert fuselm("capture", run_file).code == 0
    (made,) = counted(out, "capture", "own")
    assert made["counts"]["dtype"] == "float32" and made["counts"]["resumed_documents"] > 0

    whole = tmp_path / "whole"
    on(WITHOUT)
    assert fuselm("capture", run_file, f"output={whole}").code == 0
    assert counted(whole, "capture", "own")[0]["files"] == made["files"]


def test_a_capture_started_by_an_earlier_version_is_finished_in_the_checkpoints_type(in_dtype, on, tmp_path):
    on(WITHOUT)
    model = locate_model(str(in_dtype("bfloat16")))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".block-00000-00000.parquet").write_bytes(b"")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").write_bytes(b"")
    assert run_precision.keep_dtype(tmp_path / "old", "float32", model) == "bfloat16"
    assert run_precision.keep_dtype(tmp_path / "new", "float32", model) == "float32"
    assert run_precision.keep_dtype(tmp_path / "new", "bfloat16", model) == "float32"
