"""Keep other libraries' progress bars, log lines and warnings off the screen, because fuselm has its own display."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

# What transformers and huggingface_hub read when they are imported; a user's own setting is kept.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def silence_libraries() -> None:
    """Silence libraries for a whole command, before any of them is imported.

    Python's warnings are for developers: a command shows them only if `-W` or PYTHONWARNINGS asks for them.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def hide_library_output() -> Iterator[None]:
    """Hide the bars and log lines of transformers and huggingface_hub within the `with` block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, shows_bars, shows_hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    if shows_bars:
        logging.disable_progress_bar()
    if shows_hub_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_hub_bars:
            enable_progress_bars()
        if shows_bars:
            logging.enable_progress_bar()
