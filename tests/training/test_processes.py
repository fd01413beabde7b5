"""Test training in two real processes, which train as one does, and a whole run in two."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import shards
import tiny_run
import torch
from accelerate.commands.config.config_args import load_config_from_file
from trainings import documents, fused, python_path, target, train, weights  # noqa: F401

from fuselm.runs import config
from fuselm.system import manifest, processes
from fuselm.training import trainer

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MIDDLE = 7  # a step within a pass
SCRIPT = """
import pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import trainings
import os
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fuselm.training import trainer
from fuselm.training import target_training

load_target = target_training.load_target


def sharded(*arguments):
    # accelerate shards nothing on CPUs unless it is told that they are GPUs
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return load_target(*arguments)


def stop(report, arguments, state, control, **_):
    if state.global_step >= state.max_steps / 2:
        raise KeyboardInterrupt


for arguments, settings, environment, interrupted, resumes in pickle.loads(Path(sys.argv[1]).read_bytes()):
    os.environ.update(environment)
    AcceleratorState._reset_state()  # so that it reads what this training is told
    target_training.load_target = sharded if environment else load_target
    split = environment.get("FSDP_STATE_DICT_TYPE") == "SHARDED_STATE_DICT"
    if interrupted:
        trainer.ProgressReport.on_save = stop
        try:
            trainings.train(*arguments, **settings)
        except KeyboardInterrupt:
            pass
        del trainer.ProgressReport.on_save
        torch.distributed.barrier()
        shards = list(arguments[0].glob("checkpoints/*/pytorch_model_fsdp_0/__1_*.distcp" if split else "nothing"))
        assert bool(shards) == split and len(shards) <= 2, shards
    assert (trainings.train(*arguments, **settings)["resumed_at_step"] > 0) == resumes
"""


class GlooCrashed(Exception):
    """Report what happened once in some 60 runs: a thread of gloo's own, pt_gloo_runloop, crashed within malloc."""


def in_two_processes(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "COLUMNS": "211"}
    environment |= {"FUSELM_CACHE": str(folder / "cache"), "PYTHONFAULTHANDLER": "1"}
    ended = subprocess.run([*LAUNCH, *command], env=environment, capture_output=True, text=True, check=False)
    crash = ended.stderr.partition("Fatal Python error: Segmentation fault")[2]
    if crash and "Current thread" not in crash:  # so it was no thread of Python's
        raise GlooCrashed(ended.stderr[-30000:])
    assert ended.returncode == 0, ended.stderr[-30000:]
    return ended


def begin_alone(*arguments, **settings) -> None:
    """Train with one process until a step in the middle of a pass, and write a checkpoint of it."""
    end_step = trainer.ProgressReport.on_step_end

    def save_early(report, arguments, state, control, **options):
        end_step(report, arguments, state, control, **options)
        control.should_save |= state.global_step == MIDDLE

    def stop(report, arguments, state, control, **_):
        if state.global_step == MIDDLE:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.ProgressReport, "on_step_end", save_early)
        patch.setattr(trainer.ProgressReport, "on_save", stop)
        train(*arguments, **settings)


def test_the_only_process_is_the_first_of_one():
    assert (processes.rank(), processes.world_size()) == (0, 1)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
def test_two_processes_padded_packed_or_interrupted_have_the_losses_of_one_over_20_steps(
    tmp_path,
    target,
    documents,
    fused,
    is_sharded,
):
    try:
        compare_with_one(tmp_path / "once", target, documents, fused, is_sharded)
    except GlooCrashed:
        compare_with_one(tmp_path / "again", target, documents, fused, is_sharded)


def compare_with_one(folder: Path, target, documents, fused, is_sharded: bool) -> None:
    """Train in one process and in two, and hold the losses and weights of the two to those of the one."""
    folder.mkdir()
    accelerated = load_config_from_file(str(ROOT / "examples" / "accelerate" / "fsdp-8gpu.yaml"))
    fsdp = {name.upper(): str(value) for name, value in accelerated.fsdp_config.items()} | {
        "ACCELERATE_USE_FSDP": "true"
    }
    common = {"passes": 5, "evaluations_per_pass": 1, "lambda_final": 0.1, "average": 2.0}
    ways = {"padded": {"batch_documents": 2}, "packed": {"batch_documents": None, "pack_tokens": 131}}
    ways["sharded"] = ways["padded"] | {"gradient_checkpointing": True}
    ways["interrupted"], ways["split-interrupted"] = ways["padded"], ways["sharded"]  # split: checkpoints, too
    ways["joined"] = ways["padded"]  # begun by one process, and resumed by two
    ways = {name: way for name, way in ways.items() if name.startswith(("sharded", "split")) == is_sharded}
    jobs = []
    for name, settings in ways.items():
        one, two = folder / f"{name}-one", folder / f"{name}-two"
        train(one, target, documents, fused, gradient_accumulation=2, **common, **settings)
        two.mkdir()
        if name == "joined":
            begin_alone(two, target, documents, fused, gradient_accumulation=2, **common, **settings)
        environment = fsdp if name.startswith("split") else {}
        if name == "sharded":
            environment = fsdp | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        stops = name.endswith("interrupted")
        jobs.append(((two, target, documents, fused), common | settings, environment, stops, stops or name == "joined"))
    (folder / "script.py").write_text(SCRIPT)
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    in_two_processes([str(folder / "script.py"), str(folder / "jobs")], folder)
    for name in ways:
        one, two = (folder / f"{name}-{processes}" for processes in ("one", "two"))
        mine, theirs = (json.loads((out / "history.json").read_text()) for out in (one, two))
        assert len(mine["log"]) >= 20
        for a, b in zip(mine["log"] + mine["dev"], theirs["log"] + theirs["dev"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        for key, weight in weights(one).items():
            torch.testing.assert_close(weights(two)[key], weight, rtol=1e-2, atol=1e-3)


def test_the_example_for_8_gpus_is_one_that_accelerate_and_fuselm_take():
    accelerated = load_config_from_file(str(ROOT / "examples" / "accelerate" / "fsdp-8gpu.yaml"))
    assert (accelerated.num_processes, str(accelerated.distributed_type)) == (8, "DistributedType.FSDP")
    assert config.load(ROOT / "examples" / "fsdp-run.yaml").train.pack_tokens == 8192


RUN = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import shards
from fuselm.cli import main
shards.make_parts_small()
shards.share_first_parts(int(os.environ.get("WORLD_SIZE", "1")), Path(__file__).parent)
sys.argv = ["fuselm", "run", *sys.argv[1:]]
main.main()
"""


def test_two_processes_share_every_stage_of_a_run_and_end_with_what_one_has(
    tmp_path, byte_level, sentence_piece, texts, monkeypatch
):
    rows, summaries, files = tiny_run.short(texts), [], []
    for name, options in (("one", {"gradient_accumulation": 2}), ("two", {})):
        run_file = tiny_run.write(
            tmp_path / name,
            target=byte_level,
            sources={"other": sentence_piece},
            rows=rows,
            train=tiny_run.TRAIN | options,
        )
        (tmp_path / name / "script.py").write_text(RUN)
        command = [str(tmp_path / name / "script.py"), str(run_file)]
        monkeypatch.setenv(shards.LOG, str(tmp_path / f"{name}.log"))
        if name == "one":
            environment = os.environ | {"PYTHONPATH": python_path(), "FUSELM_CACHE": str(tmp_path / "cache")}
            subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
        else:
            ended = in_two_processes(command, tmp_path)
            assert ended.stdout.count("\nreport.html") == 1  # one of them speaks
        out = tmp_path / name / "out"
        summaries.append(tiny_run.summary(out))
        made = [path for stage in ("corpus", "capture", "align", "fuse") for path in (out / stage).iterdir()]
        files.append({path.name: manifest.read(path)["files"] for path in made})
    one, two = summaries
    for model, row in one["models"].items():
        assert row["average"]["bits_per_byte"] == pytest.approx(
            two["models"][model]["average"]["bits_per_byte"], rel=1e-4
        )
    assert one["models"]["base"] == two["models"]["base"] and files[0] == files[1]
    alone, shared = (
        [line.split() for line in (tmp_path / f"{name}.log").read_text().splitlines()] for name in ("one", "two")
    )
    assert len(alone) == len(shared) == len({(folder, part) for folder, part, _ in shared})
    assert len({process for _, _, process in shared}) == 2
