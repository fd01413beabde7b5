"""A whole run prints fuselm's own lines alone, in a pipe and on a terminal: no bars and warnings of other libraries."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from fuselm.system.library_output import QUIET

FOREIGN = re.compile(r"%\||it/s|Warning|WARNING|\bINFO\b|loss': ")


@pytest.fixture
def run_file(tmp_path, byte_level, sentence_piece, texts) -> Path:
    rows = tiny_run.short(texts)
    return tiny_run.write(tmp_path, target=byte_level, sources={"other": sentence_piece}, rows=rows)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in QUIET}
    return kept | {"FUSELM_CACHE": str(tmp_path / "cache"), "COLUMNS": "100", "TERM": "xterm"}


def test_a_run_in_a_pipe_prints_its_own_lines(run_file, environment):
    command = [sys.executable, "-m", "fuselm", "run", str(run_file)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not [line for line in (ended.stdout + ended.stderr).splitlines() if FOREIGN.search(line)]
    assert "done in" in ended.stderr


def test_a_run_on_a_terminal_prints_its_own_lines(run_file, environment):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "fuselm", "run", str(run_file)]
    process = subprocess.Popen(command, env=environment, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while block := os.read(leader, 1 << 16):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = shown.decode("utf-8", "replace")
    assert "done in" in text and not FOREIGN.search(text)
