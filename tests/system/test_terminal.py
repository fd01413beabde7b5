"""terminal.py: off a terminal a table is not wrapped, unless COLUMNS says how wide a line may be."""

import io
import os
import pty
import subprocess
import sys

from rich.table import Table

from fuselm.system.terminal import open_console

WIDE = "a heading of some length that a table of eighty columns would cut, and fold into three lines or four"
SCRIPT = f"""
from rich.table import Table
from fuselm.system.terminal import open_console
table = Table("a", "b", show_edge=False)
table.add_row({WIDE!r}, {WIDE!r})
open_console().print(table)
"""


def test_a_pipe_gets_each_row_of_a_table_on_one_line():
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", SCRIPT]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1].count(WIDE) == 2
    assert max(map(len, printed.splitlines())) < 3 * len(WIDE)


def test_columns_of_the_environment_are_respected():
    environment = os.environ | {"COLUMNS": "80"}
    command = [sys.executable, "-c", SCRIPT]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert max(map(len, printed.splitlines())) <= 80


def test_a_terminal_wraps_at_its_width():
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, stdout=follower, check=True)
    os.close(follower)
    printed = os.read(leader, 1 << 16).decode()
    assert WIDE not in printed


def test_a_file_is_written_without_wrapping(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text, table = io.StringIO(), Table("a")
    table.add_row(WIDE)
    open_console(file=text).print(table, WIDE * 3)
    assert WIDE in text.getvalue() and WIDE * 3 in text.getvalue().splitlines()
