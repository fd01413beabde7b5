"""Define the options of models: the target, and sources that are models or servers."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_serializer, model_validator

from fuselm.models.choices import DTYPES
from fuselm.runs.options.base import OneOf, Options, Positive
from fuselm.system import addresses

SYSTEM = "Let this source read conversations behind this system prompt. The target never sees it."


class ModelOptions(Options):
    """Name a model. A plain string in the file stands for its `model`."""

    model: str = Field(
        description="Load this model: a hub id, a folder, a GGUF file, or a run's folder, which "
        "stands for its fused model. Folders and files may be on an object store: s3://bucket/model."
    )
    revision: str | None = Field(
        None, description="Take this branch, tag or commit of a hub id; `main` if nothing is given."
    )
    dtype: Annotated[str, OneOf(DTYPES)] = Field("auto", description="Run the model in this number type.")


class LocalSourceOptions(ModelOptions):
    """Name a source that runs on this machine. A plain string in the file stands for its `model`."""

    store: str | None = Field(
        None,
        description="Use this folder, an earlier capture of the same documents by this model, instead of running the "
        "model. It may be on an object store.",
    )
    system: str | None = Field(None, description=SYSTEM)

    @model_serializer(mode="wrap")
    def _omit_unused_system(self, write: Any) -> dict[str, Any]:
        """Leave out `system` where it is not given: reports made before this option existed keep their keys."""
        written = write(self)
        if self.system is None:
            written.pop("system", None)
        return written


class ServerOptions(Options):
    """Name a source that a server runs: vLLM, SGLang, or llama.cpp by llama-cpp-python[server]."""

    server: str = Field(
        description="Ask the server at this address, `http://host:port/v1`. Its key belongs into the environment."
    )
    model: str = Field(description="Ask for the model that the server has under this name.")
    tokenizer: str = Field(description="Load the model's tokenizer from this hub id, folder or GGUF file.")
    revision: str | None = Field(
        None,
        description="State which revision the server runs, if you know it. Another revision is captured again.",
    )
    context_length: int | None = Field(
        None,
        ge=16,
        description="Send at most this many tokens in one request. If nothing is given, the server is asked; "
        "llama.cpp does not say, so give its `n_ctx`.",
    )
    key_env: str | None = Field(
        None,
        description="Read the server's key from this environment variable; from FUSELM_API_KEY if nothing is given.",
    )
    requests: int = Field(8, ge=1, description="Keep this many requests in flight at a time.")
    timeout: Positive = Field(
        600.0, description="Wait this many seconds for a whole answer, including the time behind other requests."
    )
    key_over_http: bool = Field(
        False, description="Send the key over plain http to another machine, where others may read it on its way."
    )
    system: str | None = Field(None, description=SYSTEM)

    @field_validator("server")
    @classmethod
    def _check_address(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("has a name or key in it; put the key into the environment variable FUSELM_API_KEY")
        addresses.read_address(value)
        return value.rstrip("/")

    @model_validator(mode="after")
    def _check_key_over_http(self) -> "ServerOptions":
        address = addresses.read_address(self.server)
        if self.key_over_http and (address.scheme == "https" or addresses.is_this_machine(address.host)):
            raise ValueError("key_over_http: does nothing with https or a server on this machine; drop it")
        return self

    @model_serializer(mode="wrap")
    def _omit_unused_key_option(self, write: Any) -> dict[str, Any]:
        """Leave out `key_over_http` and `system` where unused: reports made before they existed keep their keys."""
        written = write(self)
        if not self.key_over_http:
            written.pop("key_over_http", None)
        if self.system is None:
            written.pop("system", None)
        return written


def suggest_source_name(model: str) -> str:
    """Return a short name for a model: the word that its name begins with, as qwen for Qwen/Qwen2.5-Coder-0.5B."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    word = re.match(r"[a-z]+", last) or re.match(r"[a-z0-9]+", last)
    return word[0] if word else "source"


def _expand_string(value: Any) -> Any:
    """Return the options that a plain string stands for."""
    return {"model": value} if isinstance(value, str) else value


def _find_kind(value: Any) -> str:
    """Return whether the options of a source are those of a server or of a model."""
    is_server = isinstance(value, ServerOptions) or (isinstance(value, dict) and "server" in value)
    return "server" if is_server else "model"


def _check_named(value: Any) -> Any:
    """Raise `ValueError` if sources have no names, and show how to give them some."""
    if isinstance(value, list | str):
        given = value if isinstance(value, list) else [value]
        first = next((spec for spec in given if isinstance(spec, str)), "models/qwen")
        kind = "a list" if isinstance(value, list) else "one model"
        raise ValueError(
            f"sources: {kind} without names; write name: model, as {{{suggest_source_name(first)}: {first}}}"
        )
    return value


TargetOption = Annotated[ModelOptions, BeforeValidator(_expand_string, json_schema_input_type=str | ModelOptions)]
SourceOption = Annotated[
    Annotated[
        LocalSourceOptions,
        BeforeValidator(_expand_string, json_schema_input_type=str | LocalSourceOptions),
        Tag("model"),
    ]
    | Annotated[ServerOptions, Tag("server")],
    Discriminator(_find_kind),
]
SourcesOption = Annotated[dict[str, SourceOption], Field(min_length=1), BeforeValidator(_check_named)]
