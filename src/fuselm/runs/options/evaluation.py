"""Define the options of evaluation."""

from pydantic import Field

from fuselm.runs.options.base import Options


class EvaluateOptions(Options):
    """Say how models are scored on the held-out documents."""

    batch_tokens: int = Field(
        1024,
        ge=1,
        description="Read at most this many tokens in one forward pass. The default suits a CPU; raise it on a GPU.",
    )
