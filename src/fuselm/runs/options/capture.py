"""Define the options of capture: which entries are kept, what sources read first, and how they are run."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from fuselm.runs.options.base import OneOf, Options
from fuselm.sources.choices import ENGINES
from fuselm.stores.policies import POLICIES, POLICY_DESCRIPTIONS

DEFAULT_POLICY = "sampled"


class CaptureOptions(Options):
    """Say which entries of a source's distributions are kept, and how the source is run."""

    policy: Annotated[str, OneOf(POLICY_DESCRIPTIONS)] = Field(
        DEFAULT_POLICY, description="Choose which entries of each token's distribution are kept."
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="Keep at most this many entries of each token; the rest is the token's tail mass. For every "
        "policy except `sampled`; 64 if nothing is given.",
    )
    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep entries of at least this probability, with policy `threshold`; 0.0065 if nothing is given.",
    )
    mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the most probable entries until they reach this probability, with policy `nucleus`; 0.9 if "
        "nothing is given.",
    )
    draws: int | None = Field(
        None,
        ge=1,
        description="Keep entries of at least 1/draws, and one draw for each 1/draws of the mass that is left, with "
        "policy `sampled`; 28 if nothing is given.",
    )
    prefix_tokens: int = Field(
        256,
        ge=0,
        description="Let a source read this many tokens of other documents of the domain in front of each document, at "
        "most a fifth of its context, so that it knows what texts are like there. Conversations are read behind whole "
        "conversations. Servers read none. 0 turns it off.",
    )
    batch_tokens: int = Field(
        1024,
        ge=1,
        description="Read at most this many tokens in one forward pass, unless one row has more: a document, or a "
        "prefix with four times as much of documents. The default suits a CPU; raise it on a GPU.",
    )
    engine: Annotated[str, OneOf(ENGINES)] = Field("local", description="Run the sources with this engine.")
    workers: int | None = Field(
        None,
        ge=1,
        description="Run this many processes that each hold the model, with engine `ray`; 2 if nothing is given.",
    )

    @model_validator(mode="after")
    def _check_workers(self) -> "CaptureOptions":
        if self.workers is not None and self.engine != "ray":
            raise ValueError(f"capture.workers: an option of engine ray (got engine '{self.engine}'); drop it")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> "CaptureOptions":
        if self.engine == "vllm" and self.policy not in ("threshold", "top_k"):
            raise ValueError(
                f"capture.policy: vLLM gives the most probable entries only (got policy '{self.policy}'); set "
                "capture.policy to threshold or top_k, or take another capture.engine"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in_policy(cls, options: Any) -> Any:
        """Give the policy its default numbers. Raise `ValueError` on a number of another policy."""
        if not isinstance(options, dict) or (policy := options.get("policy", DEFAULT_POLICY)) not in list(POLICIES):
            return options
        for name in sorted(set().union(*POLICIES.values()) - set(POLICIES[policy])):
            if options.get(name) is not None:
                owners = " and ".join(p for p, taken in POLICIES.items() if name in taken)
                raise ValueError(
                    f"capture.{name}: an option of {owners}, but capture.policy is {policy}; drop one of them"
                )
        return POLICIES[policy] | options

    def adapt_to_server(self) -> "CaptureOptions":
        """Return the options for servers: no prefix, and no draws, because no server gives whole distributions."""
        changes: dict[str, Any] = {"prefix_tokens": 0}
        if self.policy == "sampled":
            changes |= {"policy": "threshold", "draws": None} | POLICIES["threshold"]
        return self.model_copy(update=changes)

    @property
    def process_count(self) -> int:
        """Return how many processes hold the model."""
        return (self.workers or 2) if self.engine == "ray" else 1

    @property
    def recipe(self) -> dict[str, Any]:
        """Return all that the outcome depends on."""
        without = {"engine", "workers"} | ({"prefix_tokens"} if not self.prefix_tokens else set())
        return self.model_dump(exclude_none=True, exclude=without)

    @property
    def retention(self) -> dict[str, Any]:
        """Return the policy and its numbers."""
        return {"policy": self.policy} | {name: getattr(self, name) for name in POLICIES[self.policy]}
