"""Have a model answer tasks by lm-eval."""

import contextlib
import io
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fuselm.models.locating import Model
from fuselm.results.tasks.answers import collect_rows
from fuselm.results.tasks.catalogue import FEWSHOT_SEED, find_version
from fuselm.system.errors import summarize_error
from fuselm.system.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.task import Task

RESAMPLES = 1000  # of lm-eval's own standard errors, where they have no formula


def ask_model(
    model: Model,
    tasks: "Mapping[str, Task]",
    *,
    dtype: str,
    batch_tokens: int,
    limit: int | None,
    chat_template: bool,
    run_code: bool,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of all answers, and lm-eval's numbers by task.

    Raises:
        ValueError: If the model or a task fails, or a task runs code and `run_code` is off.
    """
    import numpy as np
    import torch
    from lm_eval import evaluate

    from fuselm.models import probe
    from fuselm.results.tasks.reading import SharedReadingLM
    from fuselm.results.tasks.sandbox import score_in_sandbox
    from fuselm.system import machine

    check_code(tasks, run_code=run_code)
    machine.use_free_cores()
    loaded, layer = probe.load_tried_model(model, dtype=dtype)
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    asked = SharedReadingLM(loaded, layer, str(model.folder), batch_tokens=batch_tokens, progress=progress)
    if chat_template and getattr(asked.tokenizer, "chat_template", None) is None:
        raise ValueError(f"{model.name}: has no chat template; drop evaluate.chat_template, or leave this model out")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        for task in tasks.values():
            if getattr(task, "UNSAFE_CODE", False) and not hasattr(task.config.process_results, "is_sandboxed"):
                stack.enter_context(score_in_sandbox(task))
        try:
            found = evaluate(
                lm=asked,
                task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=RESAMPLES,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                confirm_run_unsafe_code=run_code,
            )
        except (ValueError, AssertionError, KeyError, TypeError) as error:
            raise ValueError(f"{model.name}: {', '.join(tasks)}: lm-eval failed ({summarize_error(error)})") from error
    rows = [row for name in tasks for row in collect_rows(name, found["samples"][name])]
    return rows, {name: _select_numbers(found, name, task) for name, task in tasks.items()}


def check_code(tasks: "Mapping[str, Task]", *, run_code: bool) -> None:
    """Raise `ValueError` if a task runs code that a model writes and that is off, or cannot be done safely here."""
    running = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if running and not run_code:
        raise ValueError(
            f"evaluate.tasks: {running[0]} runs code that models write; allow it with evaluate.run_code: true, or "
            "leave the task out"
        )
    if running:
        from fuselm.results.tasks.sandbox import check_sandbox

        check_sandbox()


def _select_numbers(found: Mapping[str, Any], name: str, task: "Task") -> dict[str, Any]:
    """Return lm-eval's numbers of a task with their standard errors, and which of them are better if higher."""
    values = {k: v for k, v in found["results"][name].items() if "," in k}
    return {
        "values": {k: v if isinstance(v, int | float) else None for k, v in values.items()},
        "questions": found["n-samples"][name]["effective"],
        "higher_is_better": {k: bool(v) for k, v in (task.higher_is_better() or {}).items()},
        "num_fewshot": task.get_config("num_fewshot"),
        "version": str(found["versions"].get(name)),
        "lm_eval": find_version(),
    }
