"""Test cleaning.py and `fuselm clean`: only what nothing needs may go, and what is deleted was listed before."""

import fcntl
import io
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny_run
import yaml
from tiny_run import fuselm

from fuselm.cli import clean_cli
from fuselm.runs import cleaning
from fuselm.system import manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Return a folder with a run file and `mine`, a finished run; tests must not change it."""
    folder = tmp_path_factory.mktemp("cleaning")
    given = {"output": str(folder / "mine"), "store_dir": "auto", "train": tiny_run.TRAIN | {"passes": 1}}
    sources = {"own": byte_level, "other": sentence_piece}
    tiny_run.write(folder, target=byte_level, sources=sources, rows=tiny_run.short(texts), **given)
    outcome = fuselm("run", folder / "run.yaml")
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def beside(made, tmp_path) -> Path:
    """Return a copy of the folder that tests may change."""
    for path in made.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, tmp_path / path.name)
    for file in [tmp_path / "run.yaml", *tmp_path.glob("mine/*.json"), tmp_path / "stores/.runs.json"]:
        file.write_text(file.read_text().replace(str(made), str(tmp_path)))
    return tmp_path


def listed(path: Path, **options) -> dict[str, str]:
    """Return what the listing says of each folder, by its name without the key."""
    found = {}
    for folder in cleaning.survey(path, **options):
        name = f"{folder.path.parent.name} {folder.path.name.rpartition('-')[0]}"
        assert name not in found and folder.size > 0 and folder.seconds >= 0
        found[name] = f"{'delete' if folder.is_useless else 'keep'}: {folder.reason}"
    return found


def test_all_folders_of_a_finished_run_are_used(beside):
    kept = dict.fromkeys(
        ["align other", "align own", "capture other", "capture own", "fuse ", "train clm", "train fused"],
        "keep: used by mine",
    )
    assert listed(beside) == listed(beside / "mine") == kept
    outcome = fuselm("clean", beside)
    assert outcome.code == 0 and outcome.out.endswith("Nothing to delete.\n")


def test_captures_go_when_they_are_asked_for_and_the_run_stays_finished(beside):
    captured = sorted((beside / "stores/capture").iterdir())
    outcome = fuselm("clean", beside / "mine", "--captures", "--dry-run")
    assert outcome.code == 0 and "Would delete 2 folders, " in outcome.out
    assert all(path.is_dir() for path in captured)
    outcome = fuselm("clean", beside / "mine", "--captures", "--yes")
    assert outcome.code == 0 and "Deleted 2 folders, " in outcome.out
    for path in captured:
        assert f"../stores/capture/{path.name}" in outcome.out and not path.exists()
    assert list((beside / "stores/capture").iterdir()) == []
    before = fuselm("diagnose", beside / "mine", "--json").out
    outcome = fuselm("run", beside / "run.yaml")
    assert outcome.code == 0 and outcome.stages == [] and "Nothing to do" in outcome.err
    for command in ("inspect", "diagnose"):
        assert fuselm(command, beside / "mine").code == 0
    assert before and not list((beside / "stores/capture").iterdir())
    outcome = fuselm("run", beside / "run.yaml", "train.lambda_clm=0.5")
    assert outcome.code == 0 and outcome.stages[0] == "train fused at 0.003"


def test_a_diagnosis_is_the_same_without_captures(made, beside):
    expected = fuselm("diagnose", made / "mine", "--json")
    shutil.rmtree(beside / "stores/capture")
    found = fuselm("diagnose", beside / "mine", "--json")
    assert found.code == expected.code == 0 and found.out == expected.out


def test_what_a_diagnosis_made_stays(beside):
    given = yaml.safe_load((beside / "run.yaml").read_text())
    del given["sources"]["own"]  # the target, which only a diagnosis captures then
    (beside / "alone.yaml").write_text(yaml.safe_dump(given | {"output": str(beside / "alone")}))
    assert fuselm("diagnose", beside / "alone.yaml").code == 0
    shown = listed(beside / "alone", captures=True)
    assert shown["capture target"] == shown["align target"] == "keep: used by `fuselm diagnose`"


def test_what_another_run_needs_to_finish_stays(beside):
    second = [beside / "run.yaml", f"output={beside / 'second'}", "align.top_k=3"]
    assert fuselm("capture", *second).code == 0
    needed = "keep: needed to finish second"
    shown = listed(beside / "mine", captures=True)
    assert shown["capture own"] == shown["capture other"] == needed and shown["align own"] == "keep: used by mine"
    assert fuselm("align", *second).code == 0
    shown = {folder.path: folder.reason for folder in cleaning.survey(beside, captures=True)}
    (aligned,) = [path for path, reason in shown.items() if reason == "needed to finish second" and "own" in path.name]
    assert aligned.parent.name == "align"
    both = "aligned; only other align options of mine, second would need it again"
    assert [reason for path, reason in shown.items() if path.parent.name == "capture"] == [both] * 2


def test_what_was_left_by_other_options_goes(beside):
    assert fuselm("fuse", beside / "run.yaml", "align.top_k=3", f"output={beside / 'second'}").code == 0
    shutil.rmtree(beside / "second")
    shown = [folder for folder in cleaning.survey(beside) if folder.is_useless]
    assert {folder.path.parent.name for folder in shown} == {"align"} and len(shown) == 2
    assert {folder.reason for folder in shown} == {"no run uses it"}
    assert not [folder for folder in cleaning.survey(beside / "mine") if folder.is_useless]  # not this run's
    assert "Deleted 2 folders" in fuselm("clean", beside / "stores", "--yes").out
    assert fuselm("run", beside / "run.yaml").stages == []


def test_a_folder_that_is_being_made_stays_and_a_begun_one_while_its_run_is_there(beside):
    options = [f"output={beside / 'second'}", "capture.draws=7"]
    process = tiny_run.start("capture", beside / "run.yaml", *options)
    while process.exitcode is None and not list(beside.glob("stores/capture/own-*.partial/.block-*.parquet")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)

    def reason() -> tuple[bool, str]:
        (found,) = [folder for folder in cleaning.survey(beside) if folder.path.name.endswith(".partial")]
        return found.is_useless, found.reason

    assert reason() == (False, "being made")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert reason() == (False, "begun; second resumes it")
    shutil.rmtree(beside / "second")
    assert reason() == (True, "begun, and no run is to make it")


def test_what_other_options_began_stays_until_it_is_asked_for(beside):
    """The command with those options would resume it, as it said when it was stopped."""
    (trained,) = (beside / "mine/train").glob("fused-*")
    begun = trained.with_name("fused-0123456789abcdef.partial")
    begun.mkdir()
    (begun / "checkpoint").write_text("half")

    def judge(**options) -> tuple[bool, str]:
        (found,) = [folder for folder in cleaning.survey(beside, **options) if folder.path == begun]
        return found.is_useless, found.reason

    reason = "begun by mine with other options, which would resume it"
    assert judge() == (False, reason) and judge(begun=True) == (True, reason)
    assert "Nothing to delete" in fuselm("clean", beside, "--yes").out and begun.is_dir()
    assert "Deleted 1 folder" in fuselm("clean", beside, "--begun", "--yes").out and not begun.exists()


def test_converted_models_are_counted_and_go_when_they_are_asked_for(beside, tmp_path):
    cache = tmp_path / "cache"
    converted = cache / "gguf" / "0123456789abcdef-1"
    converted.mkdir(parents=True)
    (converted / "config.json").write_text('{"model_type": "llama"}')
    (converted / "model.safetensors").write_bytes(bytes(3 << 20))
    shown = fuselm("clean", beside, "--dry-run", cache=cache).out
    assert f"3.0 MiB in {cache / 'gguf'}" in shown and "`fuselm clean --converted` deletes them" in shown
    assert f"{beside} takes " in shown
    shown = fuselm("clean", "--converted", "--dry-run", cache=cache).out
    assert "llama; made again when its GGUF file is read" in shown and "Would delete 1 folder, 3.0 MiB" in shown
    with open(converted.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Nothing to delete" in fuselm("clean", "--converted", "--yes", cache=cache).out
    assert "Deleted 1 folder" in fuselm("clean", "--converted", "--yes", cache=cache).out and not converted.exists()


@pytest.mark.parametrize("arguments", [[], ["somewhere", "--converted"], ["--converted", "--captures"]])
def test_clean_is_of_runs_or_of_converted_models(arguments):
    outcome = fuselm("clean", *arguments)
    assert outcome.code == 2 and "--converted" in outcome.err and outcome.err.count("\n") == 1


def test_a_run_of_an_earlier_version_that_is_not_finished_keeps_everything(beside):
    (beside / "stores/capture").rename(beside / "mine/capture")
    for name in ("run.json", "steps.json"):
        (beside / "mine" / name).unlink()
    shown = listed(beside / "mine", captures=True)
    assert set(shown.values()) == {"keep: mine is not finished, and an earlier version began it"}


def test_a_store_that_the_user_gave_is_not_touched(beside, tmp_path):
    (own,) = (beside / "stores/capture").glob("own-*")
    given = tmp_path / "given" / "capture" / "own"
    given.parent.mkdir(parents=True)
    own.rename(given)
    options = [beside / "run.yaml", f"sources.own.store={given}", f"output={beside / 'second'}"]
    assert fuselm("align", *options).code == 0
    assert given not in [folder.path for folder in cleaning.survey(beside, captures=True)]


def test_a_deletion_that_was_cut_off_is_finished_by_the_next(beside, monkeypatch):
    (own,) = (beside / "stores/capture").glob("own-*")

    def cut_off(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cleaning.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            cleaning.delete(own)
    assert not own.exists() and not manifest.is_finished(own)
    (left,) = (beside / "stores/capture").glob("*.deleted")
    (shown,) = [folder for folder in cleaning.survey(beside) if folder.path == left]
    assert shown.is_useless and shown.reason == "left by a deletion that was interrupted"
    assert fuselm("clean", beside, "--yes").code == 0 and not left.exists()


@pytest.mark.parametrize("answer", [True, False])
def test_it_asks_and_does_what_is_answered(beside, monkeypatch, answer):
    asked = []
    monkeypatch.setattr(clean_cli, "_ask", lambda question: asked.append(question) or answer)
    outcome = fuselm("clean", beside, "--captures")
    assert outcome.code == 0 and asked[0].startswith("Delete 2 folders, ")
    assert bool(list((beside / "stores/capture").iterdir())) is not answer
    assert outcome.out.splitlines()[-1].startswith("Deleted 2" if answer else "Nothing was deleted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "{}/none: no such folder; name a run's folder, or the folder that runs are in"),
        (["{}/empty"], "{}/empty: no run in it; name a run's folder, or the folder that runs are in"),
        (["{}/mine", "--yes", "--dry-run"], "--dry-run and --yes: take one, as --dry-run deletes nothing"),
        (["{}/mine", "--captures"], "clean: no terminal to ask on; add --yes to delete, or --dry-run to list only"),
    ],
)
def test_what_it_cannot_do_is_one_line(beside, monkeypatch, arguments, message):
    (beside / "empty").mkdir()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    outcome = fuselm("clean", *(argument.format(beside) for argument in arguments))
    assert outcome.code == 2 and outcome.err.splitlines()[-1] == "fuselm: " + message.format(beside)


def test_ages_have_one_unit():
    ages = [clean_cli._describe_age(seconds) for seconds in (0.0, 119.0, 120.0, 7_199.0, 7_200.0, 172_800.0, 8.64e6)]
    assert ages == ["new", "new", "2 minutes", "120 minutes", "2 hours", "2 days", "100 days"]


def test_a_study_is_cleaned_as_its_seeds(beside):
    study = {
        "run": "run.yaml",
        "output": str(beside / "study"),
        "seeds": [0],
        "arms": {"fused": {"method": "fused"}},
        "experiments": [{"name": "main", "title": "Main", "arms": ["base", "fused"], "against": "base"}],
    }
    (beside / "study.yaml").write_text(yaml.safe_dump(study))
    assert fuselm("study", beside / "study.yaml").code == 0
    shown = listed(beside / "study")
    assert shown["capture own"] == "keep: used by mine, study/seed-0"
    assert shown["train fused"] == "keep: used by study/seed-0"
