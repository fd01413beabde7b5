"""Judge code that a model wrote by running it with its tests, in the sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any

from fuselm.results.tasks.sandbox import SandboxError, run_sandboxed


def judge_completion(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the program of a prompt, what the model wrote after it, and its tests runs without an error."""
    program = f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n"
    try:
        return {"pass@1": float(run_sandboxed(_execute, program))}
    except SandboxError:
        return {"pass@1": 0.0}


judge_completion.is_sandboxed = True  # so that it is not put into another sandbox


def _execute(program: str) -> bool:
    exec(program, {"__name__": "program"})
    return True
