"""Define the options of evaluation."""

from typing import Any

from pydantic import Field, model_serializer, model_validator

from fuselm.runs.options.base import Options


class EvaluateOptions(Options):
    """Say how models are scored on the held-out documents, and what tasks they are asked."""

    batch_tokens: int = Field(
        1024,
        ge=1,
        description="Read at most this many tokens in one forward pass. The default suits a CPU; raise it on a GPU.",
    )
    prefix_tokens: int = Field(
        0,
        ge=0,
        description="Let every model read so many tokens of training documents of the domain in front of each held-out "
        "document, as sources do in capture. Models that run here alone can, and texts alone.",
    )
    tasks: list[str] = Field(
        [],
        description="Ask all models these tasks of lm-eval: names of tasks, of groups and of tags. `offline` stands "
        "for those that come with fuselm and need no network, `paper` for those of FuseLLM. They need `pip install "
        "'fuselm[tasks]'`.",
    )
    include_path: str | None = Field(None, description="Look for tasks in this folder, too: YAML files of lm-eval.")
    limit: int | None = Field(None, ge=2, description="Ask at most this many questions of each task, the first.")
    num_fewshot: int | None = Field(
        None,
        ge=0,
        description="Show this many examples before each question, where a task does not fix that. If nothing is "
        "given, tasks decide.",
    )
    chat_template: bool = Field(False, description="Ask as the user of a conversation, in each model's chat template.")
    run_code: bool = Field(
        False,
        description="Run code that models write, for tasks that test it: in a process without network, with limits on "
        "time, memory and files. It needs Linux.",
    )

    @model_validator(mode="after")
    def _check_use(self) -> "EvaluateOptions":
        """Raise `ValueError` on an option that would do nothing without tasks."""
        given = [name for name in TASK_OPTIONS if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.tasks:
            raise ValueError(
                f"evaluate.{given[0]}: does nothing without tasks; name some in evaluate.tasks, or drop it"
            )
        return self

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out what has its default: reports made before there were tasks keep their keys."""
        written = write(self)
        fields = type(self).model_fields
        return {n: value for n, value in written.items() if n == "batch_tokens" or value != fields[n].default}


TASK_OPTIONS = ("include_path", "limit", "num_fewshot", "chat_template", "run_code")  # do nothing without tasks
