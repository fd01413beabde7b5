"""What `fuselm doctor` finds is what is here, and what it says to fix can be fixed so."""

import importlib.metadata
import json
from pathlib import Path

import captures
import pytest
import yaml
from model_server import NAME, ModelServer
from tiny_run import fuselm

from fuselm.models import precision
from fuselm.runs import config, doctor
from fuselm.system import compiling, machine


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSELM_API_KEY", "")
    return tmp_path / "cache"


def write(folder: Path, **options) -> Path:
    run = {"output": str(folder / "out"), "target": "a", "sources": {"a": "a"}, "corpus": {"files": ["t.txt"]}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run | options))
    return folder / "run.yaml"


def test_versions_and_extras_are_those_that_are_installed(cache):
    found = doctor.examine()
    for name in ("torch", "transformers", "fuselm"):
        assert found["versions"][name] == importlib.metadata.version(name)
    assert found["extras"]["lora"] == {"missing": [], "install": "pip install 'fuselm[lora]'"}
    assert "test" not in found["extras"] and found["devices"][-1]["device"] == "cpu"
    assert found["machine"]["usable_cores"] == machine.count_usable_cores()
    assert found["problems"] == []


def test_caches_are_measured(cache):
    (cache / "maps" / "deep").mkdir(parents=True)
    (cache / "maps" / "deep" / "map").write_bytes(b"x" * 1009)
    (cache / "maps" / "other").write_bytes(b"x" * 31)
    (cache / "maps" / "link").symlink_to("other")
    assert doctor.measure_caches()["maps"] == {"folder": str(cache / "maps"), "bytes": 1040}


def test_speeds_are_those_that_were_measured_and_nothing_is_measured_for_the_doctor(cache):
    assert doctor.examine_precision()["measured"] is None
    speeds = precision.measure_speeds("cpu")
    assert precision.recall_speeds("cpu") == speeds


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [("flags\t: avx2 avx512_bf16\n", True), ("flags\t: avx2\n", False), ("Features\t: fp bf16\n", True), ("", None)],
)
def test_bf16_instructions_are_read_from_the_processors_flags(tmp_path, monkeypatch, cpuinfo, has):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert machine.has_bf16_instructions() is has


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "file" / "cache"))
    expected = f"{tmp_path}/file/cache: cannot be written; set FUSELM_CACHE to a folder that can"
    assert doctor.examine()["problems"] == [expected]
    outcome = fuselm("doctor", "--json", cache=tmp_path / "file" / "cache")
    assert (outcome.code, json.loads(outcome.out)["problems"]) == (2, [expected])
    assert outcome.err.endswith(f"fuselm: {expected}\n")


def test_what_a_run_needs_and_is_not_installed_is_a_problem(tmp_path, cache):
    try:
        importlib.metadata.version("wandb")
        pytest.skip("wandb is installed")
    except importlib.metadata.PackageNotFoundError:
        path = write(tmp_path, train={"trackers": ["wandb"]})
    found = doctor.examine(path)
    assert found["problems"] == ["train.trackers: needs wandb, not installed here; pip install 'fuselm[wandb]'"]
    assert doctor.examine(write(tmp_path))["problems"] == []


def test_servers_are_asked_for_their_models(tmp_path, cache, byte_level):
    source = captures.source_of(byte_level)
    with ModelServer("vllm", source, byte_level) as server:
        there = {"server": server.url, "model": NAME, "tokenizer": str(byte_level)}
        found = doctor.examine(write(tmp_path, sources={"there": there, "wrong": there | {"model": "other"}, "a": "a"}))
        assert list(found["servers"]) == ["there", "wrong"]
    assert found["servers"]["there"] == {"server": server.url, "model": NAME, "problem": None}
    assert found["problems"] == [f"sources.wrong: {server.url}: serves no model 'other', but 'tiny'; name one of them"]
    gone = doctor.examine(write(tmp_path, sources={"gone": there}))
    assert len(gone["problems"]) == 1 and gone["problems"][0].startswith(f"sources.gone: {server.url}: ")


def test_advice_says_what_is_slow_or_short(cache):
    found = doctor.examine()
    assert list(doctor.list_advice(found)) == found["advice"]
    little = found | {
        "machine": found["machine"] | {"available_memory": 1 << 30},
        "kernels": {"seconds_to_compile": 25.5},
        "disk": {"output": {"folder": "out", "free": 1 << 20, "is_writable": True}},
        "devices": [{"device": "cpu", "name": "", "memory": None}],
        "precision": {"bf16_instructions": False, "measured": None},
    }
    advice = list(doctor.list_advice(little))
    assert advice[:3] == [
        "memory: 1.0 GiB can be taken, little for a run; close other programs",
        "out: 1.0 MiB free, little for a run; make room, or move it",
        "kernels: not compiled yet; the first run takes 26 s longer, or run `python -m fuselm.cli.warm_up` now",
    ]
    assert advice[-1].startswith("precision: the processor has no bf16 instructions")


def test_kernels_are_counted_as_long_as_none_is_kept(cache, monkeypatch):
    monkeypatch.setattr(compiling, "list_cache_folders", lambda: iter([cache]))
    assert doctor.examine()["kernels"]["seconds_to_compile"] == sum(compiling.SECONDS.values())


def test_the_tables_show_what_was_found(cache):
    outcome = fuselm("doctor", cache=cache)
    assert outcome.code == 0
    for shown in ("torch", importlib.metadata.version("torch"), str(cache), "not measured yet", "lora", "installed"):
        assert shown in outcome.out


def test_a_broken_run_file_is_named(tmp_path, cache):
    path = write(tmp_path, epochs=3)
    assert fuselm("doctor", path).err.endswith("epochs: unknown option; did you mean 'train.passes'?\n")
    with pytest.raises(ValueError, match=r"epochs"):
        config.load(path)
