"""Define the options of `fuselm prune`."""

from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from fuselm.models.pruning.choices import BY_TEXT, EXACT_SIZES, IMPORTANCES, STRUCTURES
from fuselm.runs.options import problems
from fuselm.runs.options.base import OneOf, Options, Seed

Size = Annotated[int, Field(ge=1)]
SAMPLES, TOKENS, MULTIPLE = 32, 128, 64


class PruneOptions(Options):
    """Say how small a model becomes, and what goes first."""

    ratio: float | None = Field(
        None, ge=0, lt=1, description="Remove this share of all parameters, embeddings among them."
    )
    params: Size | None = Field(None, description="Leave about so many parameters.")
    layers: Size | None = Field(None, description="Leave so many layers.")
    intermediate_size: Size | None = Field(None, description="Leave so many channels in each MLP.")
    kv_heads: Size | None = Field(
        None, description="Leave so many key-value heads in each layer, each with its query heads."
    )
    hidden_size: Size | None = Field(None, description="Leave so many hidden channels.")
    structures: list[Annotated[str, OneOf(STRUCTURES)]] | None = Field(
        None,
        min_length=1,
        description="Cut these by about the same share until `ratio` or `params` is met; the MLPs alone if nothing is "
        "given.",
    )
    multiple: Size | None = Field(
        None,
        description=f"Make the MLPs' and the hidden width a multiple of this; of {MULTIPLE} if nothing is given.",
    )
    importance: Annotated[str, OneOf(IMPORTANCES)] | None = Field(
        None,
        description="Score what may go in this way; by `activations` if nothing is given, or by `param_first` where "
        "experts share one tensor.",
    )
    samples: Size | None = Field(
        None, description=f"Read so many texts to score by; {SAMPLES} if nothing is given, or as many as there are."
    )
    tokens: Size | None = Field(
        None, description=f"Read at most so many tokens of each text; {TOKENS} if nothing is given."
    )
    sensitivity: bool = Field(
        False, description="Measure by how much the loss rises if one layer alone loses what is removed."
    )
    seed: Seed = Field(0, description="Draw texts, and the scores of `random`, with this seed.")

    @model_validator(mode="after")
    def _check(self) -> "PruneOptions":
        """Raise `ValueError` unless exactly one way says how much goes, and every option does something."""
        ways = [
            name for name, given in (("ratio", self.ratio), ("params", self.params), (None, None)) if given is not None
        ]
        exact = list(self.exact_sizes)
        if len(ways) + bool(exact) != 1:
            given = ", ".join([*ways, *(EXACT_SIZES[name] for name in exact)]) or "nothing"
            raise ValueError(
                f"how much goes is said by one of ratio, params or exact sizes (got {given}); "
                "give a share, such as --ratio 0.2"
            )
        if exact and (self.structures is not None or self.multiple is not None):
            name = "structures" if self.structures is not None else "multiple"
            raise ValueError(f"{name}: does nothing beside exact sizes; drop it")
        if not self.reads_texts and (self.samples is not None or self.tokens is not None):
            name = "samples" if self.samples is not None else "tokens"
            raise ValueError(f"{name}: {self.importance} reads no text; drop it")
        if self.sensitivity and not self.reads_texts:
            raise ValueError(f"sensitivity: is measured on texts, and {self.importance} reads none; drop it")
        return self

    @property
    def reads_texts(self) -> bool:
        """Tell whether units are scored by what the model makes of texts."""
        return self.importance is None or self.importance in BY_TEXT

    @property
    def exact_sizes(self) -> dict[str, int]:
        """Return the sizes that were given, by structure."""
        given = {name: getattr(self, option) for name, option in EXACT_SIZES.items()}
        return {name: size for name, size in given.items() if size is not None}


def read_prune_options(**given: object) -> PruneOptions:
    """Return the options of a command, without those that are None. Raises `ValueError`, one line, on a wrong one."""
    try:
        return PruneOptions.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ValueError(problems.describe_first_problem(error, "prune", PruneOptions)) from None
