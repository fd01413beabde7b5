"""Define the options of fusion."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from fuselm.fusion.choices import FUNCTIONS, LEVELLESS, LEVELS, SHARPENED, WHENS
from fuselm.fusion.priors import check_weights
from fuselm.runs.options.base import NotNegative, OneOf, Options, Positive


class FuseOptions(Options):
    """Say how the rows of several sources become one."""

    function: Annotated[str, OneOf(FUNCTIONS)] = Field(
        "fixed", description="Decide with this function how much each source has to say."
    )
    level: Annotated[str, OneOf(LEVELS)] = Field(
        "token",
        description="Decide over this span of text. `bayes` and `fixed` take `token` only.",
    )
    window: int = Field(256, ge=1, description="Make windows of this many bytes, with level `window`.")
    sharpness: NotNegative = Field(
        1.0,
        description="Multiply cross-entropies or entropies by this before the softmax that turns them into weights, "
        "with `avg_ce`, `log_linear` and `entropy`. 1 is the paper's; 0 leaves `weights` as they are.",
    )
    switch: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Expect with this probability that another source is the best from one token to the next, with "
        "`bayes`.",
    )
    weights: Literal["learned"] | dict[str, float | dict[str, float]] | None = Field(
        None,
        description="Begin with these weights of sources, `{qwen: 2}`, or of sources by domain, "
        "`{qwen: {python: 4, english: 0}}`; others have 1, and 0 leaves a source out. `learned` finds for each domain "
        "the weights whose mixture gives its training text the greatest probability. If nothing is given, `fixed` "
        "learns them, and other functions begin with 1.",
    )
    temperatures: dict[str, Positive] = Field(
        {},
        description="Take the rows of these sources to a temperature first, `{qwen: 1.2}`: above 1 flattens them, "
        "below 1 sharpens them.",
    )

    pairwise: bool = Field(
        False,
        description="Fuse each source by itself, with the target's own rows if the target is a source too, train a "
        "copy of the target on each, and merge the copies as `merge` says: FuseChat's way.",
    )

    when: Annotated[str, OneOf(WHENS)] = Field(
        "stage",
        description="Align and fuse at this time. Training sees the same rows either way; weights that are learned, "
        "and what reports show of alignment and fusion, come from the sample with `load`.",
    )

    @field_validator("function", mode="before")
    @classmethod
    def _refuse_oracle(cls, function: Any) -> Any:
        if function == "oracle":
            raise ValueError(
                "fuse.function: oracle is what `fuselm diagnose` compares with; its rows are those of min_ce with "
                "level: token"
            )
        return function

    @model_validator(mode="after")
    def _check_use(self) -> "FuseOptions":
        """Raise `ValueError` on an option that would do nothing, and on impossible weights."""
        if self.function in LEVELLESS and self.level != "token":
            raise ValueError(
                f"fuse.level: {self.function} has none (got '{self.level}'); take another function, such as min_ce, or "
                "leave it at 'token'"
            )
        unused = {
            "window": self.level != "window" and f"level is '{self.level}'",
            "sharpness": self.function not in SHARPENED and f"function is '{self.function}'",
            "switch": self.function != "bayes" and f"function is '{self.function}'",
        }
        for name, why in unused.items():
            if why and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"fuse.{name}: does nothing here, because {why}; drop one or set the other")
        if isinstance(self.weights, dict):
            check_weights(self.weights)
        return self

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out `pairwise` and `when` at their defaults: reports made before they existed keep their keys."""
        written = write(self)
        for name in ("pairwise", "when"):
            if getattr(self, name) == type(self).model_fields[name].default:
                written.pop(name, None)
        return written

    @property
    def recipe(self) -> dict[str, Any]:
        """Return all that the outcome depends on, with every default filled in."""
        weights = self.weights
        if weights is None:
            weights = "learned" if self.function == "fixed" else {}
        return self.model_dump(exclude={"pairwise", "when"}) | {"weights": weights}

    def select_sources(self, names: Collection[str]) -> dict[str, Any]:
        """Return the recipe of fusing some of the sources, without what it says of others."""
        recipe = self.recipe
        for option in ("weights", "temperatures"):
            if isinstance(recipe[option], dict):
                recipe[option] = {name: value for name, value in recipe[option].items() if name in names}
        return recipe
