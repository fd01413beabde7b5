"""library_output.py: bars, log lines and warnings of other libraries do not reach the screen."""

import os
import subprocess
import sys

from fuselm.system.library_output import QUIET

SCRIPT = """
import sys, warnings
from fuselm.system.library_output import silence_libraries
if sys.argv[2] == "silent":
    silence_libraries()
from transformers import AutoModelForCausalLM
from transformers.utils import logging
AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
logging.get_logger("transformers").warning("a line of the log")
warnings.warn("a warning of Python's")
"""
OUTPUT = ("%|", "a line of the log", "a warning of Python's")


def print_as(mode: str, model, out, *options: str, script: str = SCRIPT) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in QUIET}
    command = [sys.executable, *options, "-c", script, str(model), mode, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


def test_a_command_shows_nothing_of_other_libraries(byte_level, tmp_path):
    assert print_as("silent", byte_level, tmp_path / "silent") == ""
    shown = print_as("loud", byte_level, tmp_path / "loud")
    assert [part for part in OUTPUT if part not in shown] == []


def test_a_command_shows_python_warnings_if_asked_to(byte_level, tmp_path):
    shown = print_as("silent", byte_level, tmp_path / "out", "-Wdefault")
    assert "a warning of Python's" in shown and "%|" not in shown


BLOCK = """
import sys
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from fuselm.models.loading import load_model
from fuselm.models.locating import locate_model
from fuselm.system.library_output import hide_library_output
logging.set_verbosity_warning()
with hide_library_output():
    AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
    logging.get_logger("transformers").warning("a line of the log")
load_model(locate_model(sys.argv[1]), device="cpu")
print("hidden until here", file=sys.stderr)
assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_functions_hide_bars_and_log_lines_and_show_them_again_afterwards(byte_level, tmp_path):
    hidden, shown = print_as("", byte_level, tmp_path / "out", script=BLOCK).split("hidden until here\n")
    assert hidden == "" and "%|" in shown
