"""Define a run file: YAML with the options of `RunOptions`. `a.b=value` on the command line overrides one of them.

The modules of `options` define the sections. `load` looks for models and texts from the current directory, then from
the run file's folder.
"""

import copy
import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_serializer, model_validator

from fuselm.alignment.choices import LEARNED
from fuselm.fusion.choices import NOT_LINEAR
from fuselm.runs.options import files, problems
from fuselm.runs.options.alignment import AlignOptions
from fuselm.runs.options.base import Options, Seed
from fuselm.runs.options.capture import CaptureOptions
from fuselm.runs.options.chat import ChatOptions
from fuselm.runs.options.evaluation import EvaluateOptions
from fuselm.runs.options.fusion import FuseOptions
from fuselm.runs.options.merging import FUSED, RunMergeOptions
from fuselm.runs.options.sources import (
    ModelOptions,
    ServerOptions,
    SourcesOption,
    TargetOption,
)
from fuselm.runs.options.texts import CorpusOptions, DatasetOptions, WriteOptions
from fuselm.runs.options.training import TrainOptions
from fuselm.system.remote_paths import is_remote, open_path

RESERVED = {"base", "clm", "fused", "average"}  # names of rows in the result


class RunOptions(Options):
    """Hold all options of a run."""

    output: str = Field(
        description="Write the results of the run, and what only it needs, into this folder, "
        "which may be on an object store: s3://bucket/run."
    )
    store_dir: str | None = Field(
        "auto",
        description="Keep texts that sources wrote, captured and aligned stores in this folder, where every run and "
        "study with the same recipe finds them. auto: the folder `stores` beside `output`; null: in `output`, for this "
        "run alone.",
    )
    target: TargetOption = Field(description="Train this model.")
    sources: SourcesOption = Field(
        description="Fuse the knowledge of these models, each under a name that tables and pages show. The target may "
        "be one of them."
    )
    corpus: CorpusOptions = Field(description="Train and measure on these texts.")
    chat: ChatOptions = Field(ChatOptions(), description="Read conversations in this way.")
    write: WriteOptions = Field(WriteOptions(), description="Let sources write more text to learn from.")
    capture: CaptureOptions = Field(CaptureOptions(), description="Record the sources' distributions in this way.")
    align: AlignOptions = Field(
        AlignOptions(), description="Bring the distributions into the target's tokens in this way."
    )
    fuse: FuseOptions = Field(FuseOptions(), description="Fuse the aligned distributions in this way.")
    train: TrainOptions = Field(TrainOptions(), description="Train the target in this way.")
    merge: RunMergeOptions | None = Field(None, description="Merge what was trained into the fused model in this way.")
    evaluate: EvaluateOptions = Field(EvaluateOptions(), description="Score the models in this way.")
    processes: int | None = Field(
        None,
        ge=1,
        description="Let this many processes of this machine share write, capture, align, fuse and evaluate, each with "
        "a GPU of its own if there are as many. null: one for write, capture and evaluate, and as many for align and "
        "fuse as are worth starting.",
    )
    seed: Seed = Field(
        0, description="Draw splits, texts and the order of training with this seed. Another one is another experiment."
    )

    @model_validator(mode="after")
    def _check_sources(self) -> "RunOptions":
        """Raise `ValueError` on names that cannot be used, on a model that is listed twice, and on unknown sources."""
        models: dict[str, str] = {}
        for name, source in self.sources.items():
            if name in RESERVED or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(
                    f"sources.{name}: not a usable name; take letters, digits, '-', '_' and '.', and none of "
                    f"{', '.join(sorted(RESERVED))}"
                )
            where = f"{os.path.normpath(source.model)}@{source.revision}"
            if isinstance(source, ServerOptions):
                where += f" at {source.server}"
            if where in models:
                raise ValueError(f"sources.{name}: {source.model} is listed twice, as '{models[where]}' too; drop one")
            models[where] = name
        by_source = {
            "fuse.temperatures": self.fuse.temperatures,
            "fuse.weights": self.fuse.weights,
            "write.ratio": self.write.ratio,
            "write.answers": self.write.answers,
        }
        for option, given in by_source.items():
            for name in set(given if isinstance(given, dict) else ()) - set(self.sources):
                raise ValueError(f"{option}.{name}: no such source; there are {', '.join(self.sources)}")
        for option in ("ratio", "answers"):
            for name in given if isinstance(given := getattr(self.write, option), dict) else ():
                if isinstance(self.sources[name], ServerOptions):
                    raise ValueError(f"write.{option}.{name}: a server can't write; leave it out")
        return self

    @model_validator(mode="after")
    def _check_use(self) -> "RunOptions":
        """Raise `ValueError` on an option that would do nothing, and on splits that leave nothing to train on."""
        tokens, default = self.capture.prefix_tokens, CaptureOptions.model_fields["prefix_tokens"].default
        reads_prefix = any(not isinstance(s, ServerOptions) and not s.store for s in self.sources.values())
        if tokens not in (0, default) and not reads_prefix:
            raise ValueError(
                "capture.prefix_tokens: does nothing here, because every source is a server or has a store; drop it"
            )
        servers = [name for name, source in self.sources.items() if isinstance(source, ServerOptions)]
        if self.evaluate.prefix_tokens and servers:
            raise ValueError(
                f"evaluate.prefix_tokens: sources.{servers[0]} is a server, which reads documents by themselves; drop "
                "one of them"
            )
        if self.fuse.when == "load" and self.align.method in LEARNED:
            raise ValueError(
                f"fuse.when: load aligns documents as they are read, and align.method {self.align.method} learns from "
                "all of them first; take align.method: branches, or fuse.when: stage"
            )
        if self.corpus.dev + self.corpus.heldout >= 1:
            raise ValueError(
                f"corpus: dev {self.corpus.dev} and heldout {self.corpus.heldout} leave nothing to train on; "
                "their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _check_merge(self) -> "RunOptions":
        """Raise `ValueError` on a merge that does nothing or cannot be, and on names that stand for two models."""
        if self.merging is None:
            return self
        merge, pairwise = self.merging, self.fuse.pairwise
        if not pairwise and not merge.models and not merge.changes_one:
            raise ValueError(
                f"merge: {merge.method} of one model is that model; name others in merge.models, set fuse.pairwise: "
                "true, or take another method, such as slerp"
            )
        if not pairwise and not merge.keep_copies:
            raise ValueError("merge.keep_copies: does nothing without fuse.pairwise; drop one or set the other")
        if merge.base is not None and not merge.takes_base:
            raise ValueError(f"merge.base: does nothing here, because {merge.method} takes no differences; drop it")
        for name in merge.models:
            if name in RESERVED or name in self.sources:
                raise ValueError(f"merge.models.{name}: names something else in this run; take another name")
        trained = [n for n, s in self.sources.items() if s.model != self.target.model] if pairwise else [FUSED]
        merge.write_recipe({name: name for name in merge.name_models(trained)}, "base", self.seed)
        return self

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out `chat` where nothing is given in it: reports made before it existed keep their keys."""
        written = write(self)
        if self.chat == ChatOptions():
            written.pop("chat", None)
        return written

    def capture_options(self, source: str) -> CaptureOptions:
        """Return how that source is captured."""
        is_served = isinstance(self.sources[source], ServerOptions)
        return self.capture.adapt_to_server() if is_served else self.capture

    @property
    def merging(self) -> RunMergeOptions | None:
        """Return how the fused model is merged, with defaults if `fuse.pairwise` asks for it; None if it is trained."""
        return self.merge or (RunMergeOptions() if self.fuse.pairwise else None)

    @model_serializer(mode="wrap")
    def _omit_unused_merge(self, write: Any) -> dict[str, Any]:
        """Leave out `merge` where nothing is merged: reports made before this option existed keep their keys."""
        written = write(self)
        if self.merge is None:
            written.pop("merge", None)
        if self.processes is None:
            written.pop("processes", None)
        return written

    @property
    def is_linear_in_rows(self) -> bool:
        """Tell whether every use of rows is linear in them, so that draws from tails are as good as the tails."""
        fuse, train = self.fuse, self.train
        is_averaged = fuse.function not in NOT_LINEAR and not fuse.temperatures
        return is_averaged and (train.divergence, train.temperature, train.confidence) == ("forward_kl", 1, "none")


def load(path: Path, overrides: files.Overrides = ()) -> RunOptions:
    """Read a run file. Raises `ValueError`, one line, on whatever is wrong with it."""
    given = files.read_options(path, "run", "options such as target, sources and corpus")
    files.refuse_other_kind(path, "run", given)
    return check(given, overrides, where=f"{path}: ", folder=path.parent)


def check(
    given: Mapping[str, Any], overrides: files.Overrides = (), *, where: str = "", folder: Path = Path()
) -> RunOptions:
    """Return the options that a mapping gives, with paths that are found from here or from `folder`.

    Raises `ValueError`, one line that begins with `where`, on whatever is wrong with it.
    """
    files.override_options(given := copy.deepcopy(dict(given)), overrides)
    try:
        run = RunOptions.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{where}{describe_problem(error)}") from None
    return _find_paths(run, folder)


def describe_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a run's options, in one line."""
    return problems.describe_first_problem(error, "run", RunOptions, shorten=_drop_tag)


def _drop_tag(location: list[str]) -> list[str]:
    """Return an option's place without the kind of source that pydantic puts into it."""
    return location[:2] + location[3:] if location[:1] == ["sources"] and len(location) > 2 else location


def _is_there(path: Path) -> bool:
    """Return whether there is such a file or folder, or one that matches the pattern."""
    return path.exists() or (
        not is_remote(path) and glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True))
    )


def _find_paths(run: RunOptions, folder: Path) -> RunOptions:
    """Return the options with paths that are found from here, those beside the run file among them."""

    def find(spec: str) -> str:
        if is_remote(spec):
            return str(open_path(spec))
        spec = os.path.expanduser(spec)
        beside = folder / spec
        return str(beside) if not _is_there(Path(spec)) and _is_there(beside) else spec

    def find_model(source: ModelOptions | ServerOptions) -> ModelOptions | ServerOptions:
        names = ("tokenizer",) if isinstance(source, ServerOptions) else ("model", "store")
        paths = {name: getattr(source, name, None) for name in names}
        return source.model_copy(update={name: find(path) for name, path in paths.items() if path is not None})

    def find_template(template: str | None) -> str | None:
        return template if template is None or "{" in template else find(template)

    def find_dataset(dataset: DatasetOptions | None) -> DatasetOptions | None:
        return dataset and dataset.model_copy(update={"path": find(dataset.path)})

    def find_merged(merge: RunMergeOptions) -> RunMergeOptions:
        models = {name: other.model_copy(update={"model": find(other.model)}) for name, other in merge.models.items()}
        base = merge.base and merge.base.model_copy(update={"model": find(merge.base.model)})
        return merge.model_copy(update={"models": models, "base": base})

    return run.model_copy(
        update={
            "chat": run.chat.model_copy(update={"template": find_template(run.chat.template)}),
            "output": files.expand_home(run.output, "output"),
            "store_dir": None if run.store_dir is None else files.expand_home(run.store_dir, "store_dir"),
            "target": find_model(run.target),
            "sources": {name: find_model(source) for name, source in run.sources.items()},
            **({} if run.merge is None else {"merge": find_merged(run.merge)}),
            "corpus": run.corpus.model_copy(
                update={"files": [find(f) for f in run.corpus.files], "dataset": find_dataset(run.corpus.dataset)}
            ),
        }
    )
