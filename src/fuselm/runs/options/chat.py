"""Define the options of conversations."""

from pydantic import Field

from fuselm.runs.options.base import Options


class ChatOptions(Options):
    """Say how models read conversations, where their own chat templates do not."""

    template: str | None = Field(
        None,
        description="Let models that have no chat template read conversations in this one: `target` for the target's, "
        "`plain` for a simple one, a file with a Jinja template, or the template's text. If nothing is given, such "
        "models are refused.",
    )
