"""`fuselm init` asks on a terminal and takes flags elsewhere; `--version` and shell completion answer."""

import os
import pty
import subprocess
import sys

import pytest
import yaml
from tiny_run import fuselm

import fuselm as package


def complete(words: str, shell: str = "bash") -> list[str]:
    """Return what a shell is offered behind `words`, as its own script would ask for it."""
    environment = os.environ | {
        "_FUSELM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    code = "import sys; sys.argv = ['fuselm']; from fuselm.cli.main import main; main()"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    return run.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fuselm stu", ["study"]),
        ("fuselm store ver", ["verify"]),
        ("fuselm options train.lambda_c", ["train.lambda_clm"]),
        ("fuselm schema s", ["study"]),
        ("fuselm run --he", ["--help"]),
        ("fuselm fidelity --method co", ["cooccurrence"]),
    ],
)
def test_a_shell_completes_commands_options_and_names(words, offered):
    assert complete(words) == offered


def test_the_script_for_a_shell_is_printed():
    environment = os.environ | {"_FUSELM_COMPLETE": "source_bash"}
    code = "import sys; sys.argv = ['fuselm']; from fuselm.cli.main import main; main()"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "complete -o default -F _fuselm_completion fuselm" in run.stdout
    assert subprocess.run(["bash", "-n"], input=run.stdout, text=True, check=False).returncode == 0


def test_the_version_is_printed():
    assert fuselm("--version").out == f"fuselm {package.__version__}\n"


def test_flags_are_needed_where_nobody_can_be_asked():
    outcome = fuselm("init", "--target", "a")
    expected = "fuselm: --source: missing; give it, or run `fuselm init` on a terminal, where it is asked for\n"
    assert (outcome.code, outcome.err) == (2, expected)


def talk(folder, *answers: str) -> tuple[int, str]:
    """Run `fuselm init` on a terminal, and answer each of its questions."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "fuselm", "init"])
    said = b""
    for answer in answers:
        while not said.rstrip().endswith(b":") and not said.endswith(b"]: "):
            said += os.read(terminal, 1024)
        os.write(terminal, answer.encode())
        said += b"\n"
    while True:
        try:
            part = os.read(terminal, 1024)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said.decode()


def test_questions_are_asked_on_a_terminal(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"A text of some {n} words.")
    code, said = talk(
        tmp_path,
        "a.gguf\n",
        ".\n",
        "org/target\n",
        "org/qwen\n",
        "two=org/other\n",
        "\n",
        "\n",
        "*.md\n",
        "*.txt\n",
        "\n",
        "\n",
    )
    assert code == 0, said
    assert "a.gguf: no such file or folder" in said and "*.md: no file matches" in said
    assert ".: no config.json; needs a Hugging Face model folder" in said
    assert "note: corpus: fewer than 6 documents are held out" in said
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written == {
        "output": "runs/run",
        "target": "org/target",
        "sources": {"target": "org/target", "qwen": "org/qwen", "two": "org/other"},
        "corpus": {"files": ["*.txt"]},
    }


def test_no_answer_writes_nothing(tmp_path):
    code, said = talk(tmp_path, "org/target\n", "\x04")
    assert code == 2 and "init: no answer, so nothing was written" in said
    assert list(tmp_path.iterdir()) == []
