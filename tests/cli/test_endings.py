"""Test endings.py: whatever ends a command, there is a code, at most one line, and no traceback."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from fuselm.cli import endings

PRELUDE = """
import sys, time
from fuselm.cli import endings
from fuselm.system.streams import print_line

def command():
{body}
    return 0

sys.exit(endings.run_command(command))
"""
WAIT = "print('begun', flush=True); time.sleep(60)"
STOPPING = "\nfuselm: stopping; again, and it stops at once\n"
STOPPED = f"{STOPPING}fuselm: stopped\n"


def start(body: str, **options) -> subprocess.Popen:
    script = PRELUDE.format(body="".join(f"    {line}\n" for line in body.splitlines()))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | options  # ignored behind `&`
    return subprocess.Popen([sys.executable, "-c", script], **options)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_command_in_one_line(number, code):
    process = start(WAIT)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert ended(process) == (code, "", STOPPED)


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [
        ("run mine.yaml train.passes=2", True),
        ("store push a b", True),
        ("store verify a", False),
        ("study --plan s.yaml", False),
        ("merge --check m.yaml", False),
        ("evaluate m --texts=t.jsonl", False),
        ("plan mine.yaml", False),
        ("init", False),
        ("", False),
    ],
)
def test_it_is_known_whose_work_is_resumed(arguments, resumes):
    assert endings.is_resumed(arguments.split()) == resumes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_command_leaves_no_traceback(number):
    """The interpreter still closes files then, which takes a while after torch."""
    body = "import atexit\natexit.register(lambda: (print('begun', flush=True), time.sleep(60)))"
    process = start(body)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert ended(process) == (128 + number, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_it_at_once(number, code):
    process = start(f"try:\n    {WAIT}\nfinally:\n    {WAIT}")
    for _ in range(2):
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
    began = time.monotonic()
    assert ended(process) == (code, "", STOPPING) and time.monotonic() - began < 30


def test_a_signal_that_is_ignored_stays_ignored():
    body = "print('begun', flush=True); time.sleep(1); print_line('done')"
    process = start(body, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "done\n", "")


def test_a_line_of_endless_names_keeps_its_beginning_and_its_end():
    code, _, err = ended(start("raise ValueError('model ' + 'x' * 99_999 + ': do this')"))
    assert code == 2 and err.startswith("fuselm: model xxx") and err.endswith("xxx: do this\n")
    assert len(err) < 2100


PRINTERS = {
    "lines": "for _ in range(99_999): print_line('a line')",
    "one line": "print_line('a line')",
    "a table": "from fuselm.system import terminal\nfor _ in range(999): terminal.open_console().print('a line')",
}


@pytest.mark.parametrize("printer", PRINTERS)
def test_where_nobody_reads_it_ends_in_silence(printer):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(PRINTERS[printer], stdout=writing)
    os.close(writing)
    assert ended(process) == (141, None, "")


@pytest.mark.parametrize("printer", PRINTERS)
def test_with_stdout_or_stderr_closed_it_ends_as_ever(printer, tmp_path):
    for number in (1, 2):
        body = f"{PRINTERS[printer]}\nopen({str(tmp_path / 'file')!r}, 'w').close()\nprint('x', file=sys.stderr)"
        process = start(body, preexec_fn=lambda number=number: os.close(number))
        code, _, _ = ended(process)
        assert code == 0 and (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, err = ended(start("print_line('a line')", stdout=full))
    assert code == 2
    assert err == "fuselm: No space left on device; fix this and run the same command again; it resumes here\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_takes_any_character(encoding):
    body = "print_line('∞ 中\\udcff')\nraise ValueError('a\\x1b[0m\\n  中\\udcff')"
    process = start(body, env=os.environ | {"PYTHONIOENCODING": encoding}, text=False)
    code, out, err = ended(process)
    shown = {"ascii": rb"\u221e \u4e2d", "latin-1": rb"\u221e \u4e2d", "utf-8": "∞ 中".encode()}[encoding]
    assert code == 2 and out == shown + rb"\udcff" + b"\n"
    assert err == rb"fuselm: a\x1b[0m " + shown[-(6 if encoding != "utf-8" else 3) :] + rb"\udcff" + b"\n"


def test_a_fault_of_our_own_keeps_its_traceback():
    code, _, err = ended(start("1 / 0"))
    assert code == 1 and "ZeroDivisionError" in err


def test_help_into_a_closed_pipe_has_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fuselm.cli.main", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode in (1, 141) and done.stderr == ""


@pytest.mark.parametrize(("term", "has_bar"), [("xterm", True), ("dumb", False)])
def test_a_dumb_terminal_gets_lines_and_no_escapes(term, has_bar):
    body = (
        "from fuselm.system import progress; from fuselm.system import terminal\n"
        "with progress.show_progress(terminal.open_console(stderr=True), 'stage') as shown:\n"
        "    shown.start(3, unit='tokens', done=1)\n"
        "    shown.advance(1, note='[b]')"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": term, "NO_COLOR": "1"}
    process = start(body, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 1 << 16):
            shown += data
    except OSError:  # Linux says so that the other end is closed
        pass
    os.close(ours)
    assert ended(process)[0] == 0
    assert b"stage: resuming after 1 of 3 tokens" in shown and (b"\x1b[" in shown) == has_bar
