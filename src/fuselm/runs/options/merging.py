"""Define the options of merging in a run: the copies of the target that sources were fused into, or the fused model."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from fuselm.models.merging.choices import METHODS
from fuselm.runs.merging.recipe import MergedModel, MergeOptions, Scalar
from fuselm.runs.options import problems
from fuselm.runs.options.base import OneOf, Options

FUSED = "fused"  # the name of the fused model beside the names of other models


class OtherModelOptions(Options):
    """Name a model that is merged with what the run trains. A plain string in the file stands for its `model`."""

    model: str = Field(description="Merge this model: a hub id, a folder, a GGUF file, or a run's folder.")
    revision: str | None = Field(
        None, description="Take this branch, tag or commit of a hub id; `main` if nothing is given."
    )


def _expand_string(value: Any) -> Any:
    """Return the options that a plain string stands for."""
    return {"model": value} if isinstance(value, str) else value


OtherModel = Annotated[
    OtherModelOptions, BeforeValidator(_expand_string, json_schema_input_type=str | OtherModelOptions)
]
Setting = Scalar | list[Scalar]  # several are interpolated over the layers
Value = Setting | dict[str, Setting]


class RunMergeOptions(Options):
    """Say how the fused model is made by merging: of the copies of `fuse.pairwise`, of other models, or of both."""

    method: Annotated[str, OneOf({name: method.says for name, method in METHODS.items()})] = Field(
        "sce", description="Merge by this method."
    )
    parameters: dict[str, Value] = Field(
        {},
        description="Set parameters of the method, `{select_topk: 0.5}`, or of each model by its name, "
        "`{weight: {gemma: 0.7, qwen: 0.3}}`. A copy has the name of its source, and without `fuse.pairwise` the fused "
        "model is `fused`. docs/how-to/merge.md has every method's parameters.",
    )
    models: dict[str, OtherModel] = Field(
        {}, description="Merge these models, too, each under a name. They have the target's architecture and tokens."
    )
    base: OtherModel | None = Field(
        None, description="Take differences from this model; from the target as it was if nothing is given."
    )
    keep_copies: bool = Field(
        True, description="Keep the weights of the copies, to merge them again in another way or to load them."
    )

    @property
    def takes_base(self) -> bool:
        """Tell whether the method merges differences from a base."""
        return METHODS[self.method].base != "unused"

    @property
    def changes_one(self) -> bool:
        """Tell whether the method does something with one model besides the base."""
        return METHODS[self.method].changes_one

    def name_models(self, trained: list[str]) -> list[str]:
        """Return the names of all models that are merged: what the run trains, and others."""
        return [*trained, *self.models]

    def write_recipe(self, places: dict[str, str], base: str, seed: int) -> MergeOptions:
        """Return the merge of the models in these places, by name.

        Raises:
            ValueError: If the method cannot merge them or does not take a parameter.
        """
        own: dict[str, dict[str, Any]] = {name: {} for name in places}
        shared: dict[str, Any] = {}
        for parameter, value in self.parameters.items():
            if not isinstance(value, dict):
                shared[parameter] = value
                continue
            for name, setting in value.items():
                if name not in own:
                    hint = problems.suggest_name(name, list(own))
                    raise ValueError(f"merge.parameters.{parameter}: no model '{name}' is merged; {hint}")
                own[name][parameter] = setting
        models = [MergedModel(model=place, parameters=own[name]) for name, place in places.items()]
        try:
            return MergeOptions(
                method=self.method,
                models=models,
                base=MergedModel(model=base) if self.takes_base else None,
                parameters=shared,
                tokenizer="base",
                texts="the development split" if METHODS[self.method].needs_texts else None,
                seed=seed,
            )
        except ValidationError as error:
            problem = problems.describe_first_problem(error, "merge", MergeOptions)
            raise ValueError(f"merge: {problem}") from None
