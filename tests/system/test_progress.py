"""progress.py: something is on the screen within seconds, and a rate counts work alone."""

import io
import re
import time

import pytest
from rich.console import Console

from fuselm.system import progress


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "_screen", None)
    progress.use_console(Console(file=stream, width=211))
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.01)
    return stream


def wait_for(text: str, stream: io.StringIO) -> None:
    until = time.monotonic() + 30
    while text not in stream.getvalue():
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.005)


def test_slow_work_is_announced_before_anything_is_counted(screen):
    with progress.announce("hashing the weights"):
        wait_for("  hashing the weights\n", screen)


def test_quick_or_finished_work_is_not_announced(screen, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.1)
    with progress.announce("reading"):
        pass
    time.sleep(0.2)
    assert not screen.getvalue()


def test_a_stage_announces_its_work_until_it_counts(screen):
    console = Console(file=screen, width=211)
    with progress.show_progress(console, "capture own") as shown:
        with progress.announce("loading own"):
            wait_for("  capture own: loading own\n", screen)
        shown.start(7, unit="tokens")
        with progress.announce("tokenizing"):
            time.sleep(0.1)
    assert "tokenizing" not in screen.getvalue()


def test_nothing_is_announced_without_a_console(monkeypatch, capfd):
    monkeypatch.setattr(progress, "_screen", None)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.0)
    with progress.announce("reading"):
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


def test_a_compilation_is_announced_once_and_not_part_of_the_rate(screen, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress(Console(file=screen, width=211), "align own") as shown:
        shown.start(61, unit="documents")
        for _ in range(2):
            progress.note_compilation("align", 14.0)
            now[0] += 500
            progress.leave_out_of_rates(500.0)
        now[0] += 11
        shown.advance(11)
        text = screen.getvalue()
        assert text.count("compiling once for this machine, about 14 s") == 1
        assert re.search(r"11 of 61 documents, 1\.00/s, 50 s left", text)


def test_a_terminal_shows_the_same_rate_and_time_left(screen, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=screen, width=80, force_terminal=True, _environ={"TERM": "xterm"})
    with progress.show_progress(console, "align a source of a rather long name") as shown:
        shown.start(61, unit="documents")
        progress.note_compilation("align", 14.0)
        now[0] += 500
        progress.leave_out_of_rates(500.0)
        now[0] += 11
        shown.advance(11)
    assert "11 of 61 documents, 1.00/s, 50 s left" in screen.getvalue()
