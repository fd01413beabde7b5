"""Keep other libraries' progress bars, log lines and warnings off the screen, because fuselm has its own display."""

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Iterator

# What tqdm, transformers and huggingface_hub read when they are imported; a user's own setting is kept.
QUIET = {
    "TQDM_DISABLE": "1",
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
    from transformers.utils import logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with hide_hub_bars():
        logging.set_verbosity_error()
        if shows_bars:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shows_bars:
                logging.enable_progress_bar()


@contextlib.contextmanager
def hide_hub_bars() -> Iterator[None]:
    """Hide the bars of huggingface_hub within the `with` block, without importing transformers."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def hide_gguf_bar() -> Iterator[None]:
    """Hide the bar with which transformers converts GGUF files, within the `with` block: it obeys no setting."""
    try:
        converting = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        bar = converting.tqdm
    except (ImportError, AttributeError):  # a version that has the bar elsewhere
        yield
        return
    converting.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        converting.tqdm = bar
