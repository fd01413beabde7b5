"""Test sharing.py: a shared folder knows the runs that use it."""

import multiprocessing
from pathlib import Path

from fuselm.stores.sharing import USERS, add_user, list_users


def add_many(shared: Path, runs: list[Path]) -> None:
    for run in runs:
        add_user(shared, run)


def test_runs_that_are_there_are_listed_once_each(tmp_path, monkeypatch):
    shared, runs = tmp_path / "deep/stores", [tmp_path / name for name in ("b", "a")]
    assert list_users(shared) == []
    for run in runs:
        run.mkdir()
        add_user(shared, run)
        add_user(shared, run)
    monkeypatch.chdir(tmp_path)
    add_user(shared, Path("a"))
    assert list_users(shared) == [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "a").rmdir()
    assert list_users(shared) == [tmp_path / "b"]
    assert [path.name for path in shared.iterdir()] == [USERS]


def test_no_run_is_lost_where_many_are_added_at_once(tmp_path):
    runs = [tmp_path / f"{n}" for n in range(24)]
    for run in runs:
        run.mkdir()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=add_many, args=(tmp_path / "stores", runs[n::3])) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert list_users(tmp_path / "stores") == sorted(runs, key=str)


def test_a_damaged_list_is_begun_again(tmp_path):
    for text in ("{}", "[1", '[1, null, "/nowhere/at/all"]', ""):
        (tmp_path / USERS).write_text(text)
        assert list_users(tmp_path) == []
    add_user(tmp_path, tmp_path)
    assert list_users(tmp_path) == [tmp_path]
