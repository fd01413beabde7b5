"""Say in one line what an exception of another library means."""

import contextlib
from collections.abc import Iterator

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class ModelError(ValueError):
    """Report that a model's own code failed; the message names the model."""


def summarize_error(error: BaseException) -> str:
    """Return the error's type and the first line of its message; the second line too, if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    shown = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {shown}"


@contextlib.contextmanager
def name_model_errors(name: str, doing: str) -> Iterator[None]:
    """Turn whatever a model's own code raises into one line that names the model and what it was doing."""
    try:
        yield
    except ModelError:  # named already
        raise
    except Exception as error:
        if is_out_of_memory(error):
            what = "out of memory; make batches smaller (batch_tokens, batch_documents), or take a narrower dtype"
        else:
            what = f"its own code fails ({summarize_error(error)}); try another dtype, or leave the model out"
        raise ModelError(f"{name}: {doing}: {what}") from error


@contextlib.contextmanager
def name_tokenizer_errors() -> Iterator[None]:
    """Turn whatever the tokenizers library raises, panics included, into one line."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        raise ValueError(f"a tokenizer cannot read a text ({summarize_error(error)}); leave its model out") from error


def is_foreign(error: BaseException) -> bool:
    """Tell whether another library may have raised an error. A panic in Rust is not an `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether Python, numpy, torch or the device ran out of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in message for words in _NO_MEMORY)
    )
