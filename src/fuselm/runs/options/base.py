"""Define what all sections of options share: frozen models, ranges of numbers, and choices that describe themselves."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import core_schema

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # what numpy takes


class Options(BaseModel):
    """Hold some options of a file, checked and frozen. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OneOf:
    """Mark a string as one of the names in `choices`, a mapping from each to what it does."""

    def __init__(self, choices: Mapping[str, str]):
        self.choices = dict(choices)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Accept these names and nothing else."""
        return core_schema.literal_schema(list(self.choices))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        """Show an editor what each name does, as `enumDescriptions`."""
        return {"enum": list(self.choices), "type": "string", "enumDescriptions": list(self.choices.values())}
