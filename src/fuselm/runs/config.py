"""Define every option of a run. A run file is YAML with these names; `a.b=value` on the command line overrides one.

Paths of models and texts are looked up from the current directory, then from the run file's folder.
"""

import glob
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fuselm.runs.options import files as options
from fuselm.runs.options.files import Options, Positive
from fuselm.runs.options.training import Train
from fuselm.stores.policies import POLICIES
from fuselm.system import addresses

RESERVED = {"base", "clm", "fused", "average"}  # names of rows in the result


class Source(Options):
    """Name a model to learn from; a plain string in the run file is its `model`."""

    model: str  # hub id, folder or GGUF file
    revision: str | None = None  # of a hub id
    # auto: the fastest on this machine of those that are no less precise than the checkpoint's; docs/machines.md.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Captured(Source):
    """Name a source whose distributions may be there already."""

    store: str | None = None  # a capture of this run's documents by this model; then the model is not run for one


class Server(Options):
    """Name a source that a server has: vLLM, SGLang, or llama.cpp by llama-cpp-python[server]."""

    server: str  # http://host:port/v1; its key, if it needs one, is in the environment
    model: str  # the name it is served by
    tokenizer: str  # hub id, folder or GGUF file
    revision: str | None = None  # of the served weights, if you know it: another one is captured again
    context_length: int | None = Field(None, ge=16)  # tokens; None: as the server says (llama.cpp does not: its n_ctx)
    key_env: str | None = None  # environment variable with the key; None: FUSELM_API_KEY, if there is one
    requests: int = Field(8, ge=1)  # at a time
    timeout: Positive = 600.0  # seconds a whole answer may take, waiting behind others included
    key_over_http: bool = False  # send the key over plain http to another machine: others may read it on its way

    @field_validator("server")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("has a name or key in it; put the key into the environment variable FUSELM_API_KEY")
        addresses.read_address(value)
        return value.rstrip("/")

    @model_validator(mode="after")
    def _sends_its_key(self) -> "Server":
        address = addresses.read_address(self.server)
        if self.key_over_http and (address.scheme == "https" or addresses.is_this_machine(address.host)):
            raise ValueError("key_over_http: does nothing with https or a server on this machine; drop it")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_is_usual(self, write: Any) -> dict[str, Any]:
        """Leave out `key_over_http` where it is off: reports of before this option keep their keys."""
        written = write(self)
        if not self.key_over_http:
            written.pop("key_over_http", None)
        return written


def _named(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _kind(value: Any) -> str:
    return "server" if isinstance(value, Server) or (isinstance(value, dict) and "server" in value) else "model"


ModelOption = Annotated[Source, BeforeValidator(_named)]
SourceOption = Annotated[
    Annotated[Captured, BeforeValidator(_named), Tag("model")] | Annotated[Server, Tag("server")], Discriminator(_kind)
]


class Corpus(Options):
    # Files, folders and patterns: rows with `text`, maybe `domain`, maybe `split`, as JSON lines or lists, CSV, TSV or
    # Parquet; or plain text, one document each. docs/texts.md.
    files: list[str] = Field(min_length=1)
    max_bytes: int = Field(4096, ge=16)  # longer documents are cut; so are those too long for a model's context
    # Shares of each domain's documents to choose checkpoints on, and that only the result sees. Rows whose `split` says
    # train, dev or heldout go there and count for nothing here: the rest is drawn as it would be without them.
    dev: float = Field(0.125, gt=0, lt=1)
    heldout: float = Field(0.25, gt=0, lt=1)
    share: float = Field(1.0, gt=0, le=1)  # of each domain's training documents, a larger share having all of a smaller


Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Write(Options):
    """Text that sources write after training documents of a domain, which is learnt from beside those."""

    # Bytes that they write for each byte of the training documents: all together, but for servers and the target
    # itself, or each, {gemma: 2}, or each in domains that it knows, {gemma: {french: 4}, qwen: {python: 2}}.
    ratio: Ratio | dict[str, Ratio | dict[str, Ratio]] = 0.0
    prompt_tokens: int = Field(256, ge=1)  # of the domain's documents, which a source reads before it writes a text
    tokens: int = Field(200, ge=1)  # of a text, at most
    min_p: float = Field(0.05, ge=0, le=1)  # no token of less than this share of the most probable one's probability


class Capture(Options):
    policy: Literal["threshold", "top_k", "nucleus", "sampled"] = "sampled"  # which entries are kept of a token
    top_k: int | None = Field(None, ge=1)  # entries at most; the rest is the token's tail mass. Not of sampled
    threshold: float | None = Field(None, gt=0, lt=1)  # threshold: entries of at least this probability
    mass: float | None = Field(None, gt=0, le=1)  # nucleus: the most probable entries that reach it
    draws: int | None = Field(None, ge=1)  # sampled: entries of at least 1/draws, and one draw for each that is left
    # Tokens of other documents of its domain that a source, unless it is a server, reads in front of each, a fifth of
    # its context at most: it then knows what texts are like there, which the target is to learn. 0: none.
    prefix_tokens: int = Field(256, ge=0)
    # Of one forward pass, unless one row has more: a document, or a prefix and four times as much of documents. This is
    # best on a CPU, a GPU takes more.
    batch_tokens: int = Field(1024, ge=1)
    engine: Literal["local", "ray"] = "local"  # ray: on a cluster (RAY_ADDRESS), or by several processes here
    workers: int | None = Field(None, ge=1)  # ray: processes that each hold the model; None: 2

    @model_validator(mode="after")
    def _has_workers(self) -> "Capture":
        if self.workers is not None and self.engine != "ray":
            raise ValueError(f"capture.workers: an option of engine ray (got engine '{self.engine}'); drop it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_policy(cls, options: Any) -> Any:
        if not isinstance(options, dict) or (policy := options.get("policy", "sampled")) not in list(POLICIES):
            return options
        for name in sorted(set().union(*POLICIES.values()) - set(POLICIES[policy])):
            if options.get(name) is not None:
                of = " and ".join(p for p, taken in POLICIES.items() if name in taken)
                raise ValueError(f"capture.{name}: an option of {of}, but capture.policy is {policy}; drop one of them")
        return POLICIES[policy] | options

    @property
    def of_servers(self) -> "Capture":
        """Return the options for servers: no prefix, and no draws, for no server gives a whole distribution."""
        alone: dict[str, Any] = {"prefix_tokens": 0}
        if self.policy != "sampled":
            return self.model_copy(update=alone)
        return self.model_copy(update=alone | {"policy": "threshold", "draws": None} | POLICIES["threshold"])

    @property
    def processes(self) -> int:
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


class Align(Options):
    method: Literal["span", "mined", "exact", "cooccurrence", "statistics"] = "span"
    top_k: int = Field(64, ge=1)  # entries of an aligned row


class Fuse(Options):
    # min_ce: the best source; avg_ce: a mean, the better ones weighing more; log_linear: so, but a geometric mean;
    # entropy: the surer ones weigh more; bayes: those that have predicted the document so far; fixed: as in `weights`.
    function: Literal["min_ce", "avg_ce", "log_linear", "entropy", "bayes", "fixed"] = "fixed"
    level: Literal["document", "window", "token"] = "token"  # whose cross-entropy (or entropy) decides
    window: int = Field(256, ge=1)  # bytes of a window
    # Of avg_ce, log_linear and entropy: 1 is the paper's, 0 leaves `weights`.
    sharpness: float = Field(1.0, ge=0, allow_inf_nan=False)
    switch: float = Field(0.05, ge=0, le=1)  # of bayes: chance that another source is the best from a token to the next
    # What sources begin with, {qwen: 2} or {qwen: {python: 4, english: 0}}, else 1; min_ce asks only if it is 0.
    # learned: for each domain what gives its training text the greatest probability. None: learned if `fixed`, else 1.
    weights: Literal["learned"] | dict[str, float | dict[str, float]] | None = None
    temperatures: dict[str, Positive] = Field({})  # of sources: above 1 flattens their rows, below sharpens; else 1

    @field_validator("function", mode="before")
    @classmethod
    def _no_oracle(cls, function: Any) -> Any:
        if function == "oracle":
            raise ValueError(
                "fuse.function: oracle is what `fuselm diagnose` compares with; its rows are those of min_ce with "
                "level: token"
            )
        return function

    @model_validator(mode="after")
    def _check(self) -> "Fuse":
        if self.function in ("bayes", "fixed") and self.level != "token":
            raise ValueError(
                f"fuse.level: {self.function} has none (got '{self.level}'); take another function, such as min_ce, or "
                "leave it at 'token'"
            )
        of_costs = ("avg_ce", "log_linear", "entropy")
        unused = {
            "window": self.level != "window" and f"level is '{self.level}'",
            "sharpness": self.function not in of_costs and f"function is '{self.function}'",
            "switch": self.function != "bayes" and f"function is '{self.function}'",
        }
        for name, why in unused.items():
            if why and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"fuse.{name}: does nothing here, for {why}; drop one or set the other")
        for name, of in self.weights.items() if isinstance(self.weights, dict) else ():
            for weight in of.values() if isinstance(of, dict) else (of,):
                if not 0 <= weight < math.inf:
                    raise ValueError(f"fuse.weights.{name}: a weight is 0 or more (got {weight:g})")
        return self

    @property
    def recipe(self) -> dict[str, Any]:
        """Return all that the outcome depends on, with nothing left to be worked out."""
        weights = self.weights
        if weights is None:
            weights = "learned" if self.function == "fixed" else {}
        return self.model_dump() | {"weights": weights}


Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # what numpy takes


class Evaluate(Options):
    batch_tokens: int = Field(1024, ge=1)  # of one forward pass; this is best on a CPU, a GPU takes more


class Run(Options):
    output: str  # folder of the run
    target: ModelOption
    sources: dict[str, SourceOption] = Field(min_length=1)
    corpus: Corpus
    write: Write = Write()
    capture: Capture = Capture()
    align: Align = Align()
    fuse: Fuse = Fuse()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "Run":
        models: dict[str, str] = {}
        for name, source in self.sources.items():
            if name in RESERVED or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(
                    f"sources.{name}: not a usable name; take letters, digits, '-', '_' and '.', and none of "
                    f"{', '.join(sorted(RESERVED))}"
                )
            where = f"{os.path.normpath(source.model)}@{source.revision}"
            if isinstance(source, Server):
                where += f" at {source.server}"
            if where in models:
                raise ValueError(f"sources.{name}: {source.model} is listed twice, as '{models[where]}' too; drop one")
            models[where] = name
        of_sources = {
            "fuse.temperatures": self.fuse.temperatures,
            "fuse.weights": self.fuse.weights,
            "write.ratio": self.write.ratio,
        }
        for option, given in of_sources.items():
            for name in set(given if isinstance(given, dict) else ()) - set(self.sources):
                raise ValueError(f"{option}.{name}: no such source; there are {', '.join(self.sources)}")
        for name in self.write.ratio if isinstance(self.write.ratio, dict) else ():
            if isinstance(self.sources[name], Server):
                raise ValueError(f"write.ratio.{name}: a server can't write; leave it out")
        tokens, usual = self.capture.prefix_tokens, Capture.model_fields["prefix_tokens"].default
        if tokens not in (0, usual) and all(isinstance(s, Server) or s.store for s in self.sources.values()):
            raise ValueError(
                "capture.prefix_tokens: does nothing here, for every source is a server or has a store; drop it"
            )
        if self.corpus.dev + self.corpus.heldout >= 1:
            raise ValueError(
                f"corpus: dev {self.corpus.dev} and heldout {self.corpus.heldout} leave nothing to train on; "
                "their sum must be below 1"
            )
        return self

    def capture_of(self, source: str) -> Capture:
        """Return how that source is captured."""
        return self.capture.of_servers if isinstance(self.sources[source], Server) else self.capture

    @property
    def only_averages(self) -> bool:
        """Tell whether all uses of rows are linear in them: then draws from tails are as good as the tails."""
        fuse, train = self.fuse, self.train
        averaged = fuse.function not in ("entropy", "log_linear") and not fuse.temperatures
        linear = train.divergence == "forward_kl" and train.temperature == 1 and train.confidence == "none"
        return averaged and linear


def load(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file. Raises `ValueError`, one line, on whatever is wrong with it."""
    given = options.read(path, "run", "options such as target, sources and corpus")
    for override in overrides:
        options.override(given, override)
    try:
        run = Run.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{path}: {options.first_problem(error, 'run', _known_options, _without_tag)}") from None
    return _with_paths(run, path.parent)


def _without_tag(location: list[str]) -> list[str]:
    """Return an option's place without the kind of source that pydantic puts into it."""
    return location[:2] + location[3:] if location[:1] == ["sources"] and len(location) > 2 else location


def _known_options(location: list[str]) -> list[str]:
    if location[0] == "target":
        return list(Source.model_fields)
    if location[0] == "sources":
        return list((Server if location[2:3] == ["server"] else Captured).model_fields)
    known: type[BaseModel] = Run
    for part in location[:-1]:
        known = known.model_fields[part].annotation  # type: ignore[assignment]
    return list(known.model_fields)


def _is_there(path: Path) -> bool:
    """Return whether there is such a file or folder, or one that matches the pattern."""
    return path.exists() or (glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True)))


def _with_paths(run: Run, folder: Path) -> Run:
    def found(spec: str) -> str:
        spec = os.path.expanduser(spec)
        beside = folder / spec
        return str(beside) if not _is_there(Path(spec)) and _is_there(beside) else spec

    def model(source: Source | Server) -> Source | Server:
        names = ("tokenizer",) if isinstance(source, Server) else ("model", "store")
        paths = {name: getattr(source, name, None) for name in names}
        return source.model_copy(update={name: found(path) for name, path in paths.items() if path is not None})

    return run.model_copy(
        update={
            "output": options.expand_home(run.output, "output"),
            "target": model(run.target),
            "sources": {name: model(source) for name, source in run.sources.items()},
            "corpus": run.corpus.model_copy(update={"files": [found(f) for f in run.corpus.files]}),
        }
    )
