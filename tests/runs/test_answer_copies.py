"""What a model answered for one seed of a study is not asked for another."""

from pathlib import Path

from fuselm.runs.stages import tasks
from fuselm.runs.steps import Step
from fuselm.runs.studies.answer_copies import take_answers


def step(folder: Path, *, done: bool = False) -> Step:
    given = {"name": "base", "title": "", "recipe": None, "inputs": (), "is_asked_for": True, "is_needed": not done}
    return Step(stage=tasks.STAGE, folder=folder, done=done, **given)


def put(folder: Path, text: str, *, is_finished: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "answers.parquet").write_text(text)
    if is_finished:
        (folder / "manifest.json").write_text("{}")


def test_answers_of_the_same_key_are_copied(tmp_path):
    put(tmp_path / "seed-0/tasks/base-copying-1", "no", is_finished=False)
    put(tmp_path / "seed-1/tasks/base-copying-1", "yes")
    put(tmp_path / "seed-1/tasks/base-copying-2", "other")
    wanted = tmp_path / "seed-2/tasks/base-copying-1"
    missing = tmp_path / "seed-2/tasks/fused-copying-3"
    take_answers(tmp_path, [step(wanted), step(missing)])
    assert (wanted / "answers.parquet").read_text() == "yes" and not missing.exists()
    take_answers(tmp_path, [step(wanted, done=True)])
    assert sorted(path.name for path in wanted.parent.iterdir()) == ["base-copying-1"]
