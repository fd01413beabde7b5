"""Define the options of alignment."""

from typing import Annotated

from pydantic import Field

from fuselm.alignment.choices import METHODS
from fuselm.runs.options.base import OneOf, Options


class AlignOptions(Options):
    """Say how a source's distributions are brought into the target's tokens."""

    method: Annotated[str, OneOf(METHODS)] = Field("branches", description="Align with this method.")
    top_k: int = Field(64, ge=1, description="Keep at most this many entries of each aligned row.")
