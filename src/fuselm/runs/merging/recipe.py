"""Read a file that says how to merge models: mergekit's YAML, as far as it is common, or our shorter form.

    method: ties                          merge_method: ties
    base: models/base                     base_model: models/base
    models:                               models:
      chat: {model: a, weight: 0.5}         - {model: a, parameters: {weight: 0.5}}
      code: {model: b, weight: 0.5}         - {model: b, parameters: {weight: 0.5}}

A parameter is a value, a list of values to interpolate over the layers, or a list of `{filter, value}`, of which the
first counts whose filter is a part of the tensor's name.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fuselm.models.merging.choices import METHODS, REQUIRED
from fuselm.runs.options import files, problems
from fuselm.runs.options.base import Options, Seed

Scalar = bool | int | float | str
DtypeName = Literal["float32", "bfloat16", "float16"]
OTHER_NAMES = {"lambda": "scale"}  # mergekit's name: ours


class Condition(Options):
    """Give a value to the tensors whose names have `filter` as a part; all others, without one."""

    value: Scalar | list[Scalar] = Field(description="Use this value, or interpolate between these over the layers.")
    filter: str | None = Field(None, description="Apply to tensors with this in their names; `*` or nothing to all.")


Setting = Scalar | list[Scalar] | list[Condition]


class MergedModel(Options):
    """Name a model to merge; a plain string stands for its `model`."""

    model: str = Field(description="Merge this model: a hub id, a folder, a GGUF file, or `MODEL+ADAPTER` for LoRA.")
    revision: str | None = Field(None, description="Take this branch, tag or commit of a hub id.")
    adapter: str | None = Field(None, description="Merge this folder's LoRA adapter into the model first.")
    parameters: dict[str, Setting] = Field({}, description="Set the method's parameters for this model.")

    @property
    def name(self) -> str:
        """Return what the user calls it."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


def _read_model(value: Any) -> Any:
    """Return a model's options from a string, and from parameters that stand beside `model`."""
    if isinstance(value, str):
        value = {"model": value}
    if not isinstance(value, dict):
        return value
    known = set(MergedModel.model_fields)
    beside = {name: setting for name, setting in value.items() if name not in known}
    value = {name: setting for name, setting in value.items() if name in known}
    if beside:
        value["parameters"] = {**(value.get("parameters") or {}), **beside}
    if (
        "adapter" not in value
        and isinstance(spec := value.get("model"), str)
        and "+" in spec
        and not Path(spec).exists()
    ):
        value["model"], value["adapter"] = spec.split("+", 1)
    return value


ModelEntry = Annotated[MergedModel, BeforeValidator(_read_model)]


class MergeOptions(Options):
    """Hold how to merge models. Parameters that neither a model nor `parameters` sets have the method's defaults."""

    method: str = Field(description="Merge by this method.")
    models: list[ModelEntry] = Field(min_length=1, description="Merge these models; by name or as a list.")
    base: ModelEntry | None = Field(None, description="Take differences from this model.")
    parameters: dict[str, Setting] = Field({}, description="Set the method's parameters for all models.")
    dtype: DtypeName | None = Field(
        None, description="Write tensors in this type; as the first model has them if not set."
    )
    tokenizer: Literal["union", "base"] = Field(
        "union", description="Have every model's added tokens in the result, or the first model's alone."
    )
    texts: str | None = Field(None, description="Choose the weights of `soup` on these texts, which nothing else used.")
    seed: Seed = Field(0, description="Draw what DARE drops from this seed, and the batches of `soup`.")

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, given: Any) -> Any:
        """Return mergekit's names and shapes as ours."""
        if not isinstance(given, dict):
            return given
        for name in ("slices", "modules"):
            if name in given:
                raise ValueError(
                    f"{name}: only whole models are merged here; write `models`, or run mergekit-yaml on this file"
                )
        given = dict(given)
        others = {"merge_method": "method", "base_model": "base", "out_dtype": "dtype", "tokenizer_source": "tokenizer"}
        for theirs, ours in others.items():
            if theirs in given:
                value = given.pop(theirs)
                given[ours] = value if theirs == "out_dtype" else given.get(ours, value)
        if isinstance(given.get("models"), dict):
            given["models"] = list(given["models"].values())
        return given

    @model_validator(mode="after")
    def _check_method(self) -> "MergeOptions":
        if self.method not in METHODS:
            return self
        method, known = METHODS[self.method], {*METHODS[self.method].per_model, *METHODS[self.method].shared}
        if method.base == "needed" and self.base is None:
            raise ValueError(f"base: {self.method} merges differences from a base; name one")
        if not method.least <= len(self.merged_models) <= method.most:
            needed = f"{method.least}" if method.most == method.least else f"at least {method.least}"
            raise ValueError(
                f"models: {self.method} needs {needed} besides the base (got {len(self.merged_models)}); name others"
            )
        if method.needs_texts != (self.texts is not None):
            raise ValueError(
                f"texts: {self.method} chooses weights on texts; name a file"
                if method.needs_texts
                else f"texts: does nothing here, because {self.method} takes no texts; drop it"
            )
        for where, settings in (("parameters", self.parameters), *((m.name, m.parameters) for m in self.models)):
            for name, setting in settings.items():
                ours = OTHER_NAMES.get(name, name)
                if ours in ("int8_mask",):
                    continue
                if ours not in known:
                    raise ValueError(
                        f"{where}: {self.method} has no parameter {name}; "
                        + (problems.suggest_name(name, sorted(known)) if known else "it has none")
                    )
                if where != "parameters" and ours not in method.per_model:
                    raise ValueError(f"{where}: {name} is for all models; write it under `parameters`")
                _check_values(f"{where}.{name}", ours, setting, method.choices.get(ours), method.shared.get(ours))
        for name in [*method.per_model, *method.shared]:
            default = {**method.per_model, **method.shared}[name]
            for model in self.merged_models if name in method.per_model else self.merged_models[:1]:
                if default is REQUIRED and not _has_default(name, model, self.parameters):
                    raise ValueError(f"{name}: {self.method} needs it for {model.name}; set it for every tensor")
        return self

    @property
    def merged_models(self) -> list[MergedModel]:
        """Return the models that are merged, without the base: mergekit's files may list it among them."""
        base = self.base
        if base is None or (self.method in METHODS and METHODS[self.method].base == "unused"):
            return list(self.models)
        return [m for m in self.models if (m.model, m.adapter) != (base.model, base.adapter)]

    @property
    def inputs(self) -> list[MergedModel]:
        """Return all models that are read; the first one's configuration and tokenizer are the result's."""
        has_base = self.base is not None and (self.method not in METHODS or METHODS[self.method].base != "unused")
        return [self.base, *self.merged_models] if has_base else self.merged_models

    @property
    def draws(self) -> bool:
        """Tell whether the method draws at random, by `seed`."""
        return self.method in METHODS and (METHODS[self.method].draws or METHODS[self.method].needs_texts)

    def find_parameters(self, tensor: str, place: float) -> dict[str, Any]:
        """Return the method's parameters for a tensor; `place` is 0 in the first layer and 1 in the last."""
        method = METHODS[self.method]
        result: dict[str, Any] = {}
        for name, default in method.per_model.items():
            result[name] = [
                float(_find_value(name, (m.parameters, self.parameters), tensor, place, default))
                for m in self.merged_models
            ]
        for name, default in method.shared.items():
            value = _find_value(name, (self.parameters,), tensor, place, default)
            is_number = isinstance(value, int) and not isinstance(value, bool) and not isinstance(default, int)
            result[name] = float(value) if is_number else value
        return result


def _has_default(name: str, model: MergedModel, shared: Mapping[str, Setting]) -> bool:
    """Tell whether a parameter has a value for tensors that no filter names."""
    return _find_value(name, (model.parameters, shared), "", 0.0, None) is not None


def _find_value(name: str, settings: Sequence[Mapping[str, Setting]], tensor: str, place: float, default: Any) -> Any:
    """Return the first value that is set for a tensor, or the default."""
    names = [name, *(theirs for theirs, ours in OTHER_NAMES.items() if ours == name)]
    for own in settings:
        for spelled in names:
            if spelled in own and (value := _resolve(own[spelled], tensor, place)) is not None:
                return value
    return default


def _resolve(setting: Setting, tensor: str, place: float) -> Scalar | None:
    if not isinstance(setting, list):
        return setting
    for condition in setting:
        if isinstance(condition, Condition):
            if condition.filter in (None, "*") or (tensor and condition.filter in tensor):
                return _resolve(condition.value, tensor, place)
        else:
            return _interpolate(setting, place)
    return None


def _interpolate(values: Sequence[Scalar], place: float) -> Scalar:
    """Return the value at a place of a gradient; the nearest one before where values are no numbers."""
    if any(isinstance(value, bool | str) for value in values):
        return values[int(place * (len(values) - 1))]
    at = place * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return (1 - (at - low)) * values[low] + (at - low) * values[high]


def _check_values(where: str, name: str, setting: Setting, choices: Sequence | None, default: Any) -> None:
    for value in _list_values(setting):
        if choices is not None:
            if value not in choices:
                raise ValueError(f"{where}: {value!r} is none of {', '.join(map(str, choices))}; choose one of them")
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{where}: true or false (got {value!r}); write one of them")
        elif isinstance(value, bool | str):
            raise ValueError(f"{where}: needs a number (got {value!r}); write one")
        elif isinstance(default, int) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{where}: needs a whole number of at least 1 (got {value!r}); write one")
        elif name in ("density", "select_topk", "t") and not 0 <= value <= 1:
            raise ValueError(f"{where}: needs a share from 0 to 1 (got {value!r}); write one")


def _list_values(setting: Setting) -> list[Scalar]:
    if not isinstance(setting, list):
        return [setting]
    return [v for item in setting for v in (_list_values(item.value) if isinstance(item, Condition) else [item])]


def is_run_file(path: Path) -> bool:
    """Tell whether a file says how to run, not how to merge."""
    return "target" in files.read_options(path, "merge", "a method and models")


def is_merge_file(path: Path) -> bool:
    """Tell whether a file says how to merge, not how to run."""
    given = files.read_options(path, "run", "options such as target, sources and corpus")
    return "target" not in given and bool({"method", "merge_method"} & set(given))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[MergeOptions, str | None]:
    """Read a merge file; return it, and its `output` if it names one.

    Paths of models are found from here, or from the file's folder. Raises `ValueError`, one line, on whatever is wrong.
    """
    given = files.read_options(path, "merge", "a method and models")
    files.refuse_other_kind(path, "merge", given)
    for override in overrides:
        files.override_option(given, override)
    output = given.pop("output", None)
    if output is not None and not isinstance(output, str):
        raise ValueError(f"{path}: output: needs a folder (got {output!r})")
    try:
        options = MergeOptions.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{path}: {problems.describe_first_problem(error, 'merge', MergeOptions)}") from None

    def find(spec: str) -> str:
        spec = os.path.expanduser(spec)
        beside = path.parent / spec
        return str(beside) if not Path(spec).exists() and beside.exists() else spec

    def find_model(model: MergedModel) -> MergedModel:
        adapter = None if model.adapter is None else find(model.adapter)
        return model.model_copy(update={"model": find(model.model), "adapter": adapter})

    changed = {
        "models": [find_model(model) for model in options.models],
        "texts": None if options.texts is None else find(options.texts),
        "base": None if options.base is None else find_model(options.base),
    }
    return options.model_copy(update=changed), output
