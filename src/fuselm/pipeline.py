"""The stages of a run, in order: corpus, capture, align, fuse, train, evaluate, report.

A stage's folder has its recipe's key in its name, so whatever is there need not be made again, whatever changed is made
beside it, and nothing is overwritten. `run.json` in the run's folder says which folders belong to its last run file.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from fuselm import config, corpus, fingerprints, manifest, progress, publish
from fuselm.manifest import Recipe
from fuselm.models import Model, load_tokenizer, locate
from fuselm.progress import Progress
from fuselm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fuselm import servers

STAGES = ("corpus", "capture", "align", "fuse", "train", "evaluate", "report")
METHODS = ("clm", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One folder that a run makes."""

    stage: str
    name: str  # of the source, method or model, if the stage has one folder for each
    title: str
    folder: Path
    done: bool


class Pipeline:
    """One run. A stage is a method that makes the stages before it, then its own folders, and returns their paths."""

    def __init__(self, run: config.Run, console: Console):
        self.run = run
        self.folder = Path(run.output)
        self.console = console
        self.worked = False
        self._dry = False
        self._steps: list[Step] = []
        self._keys: dict[Path, str] = {}
        self._files = [Path(file) for file in run.corpus.files]
        self._check_texts()
        self.target = locate(run.target.model, revision=run.target.revision)
        self.servers = {name: _server(s) for name, s in run.sources.items() if isinstance(s, config.Server)}
        self.sources = {
            name: self.servers[name].model if isinstance(s, config.Server) else locate(s.model, revision=s.revision)
            for name, s in run.sources.items()
        }
        self._check_sources()

    def _check_sources(self) -> None:
        first: dict[str, str] = {}
        for name, model in self.sources.items():
            if (other := first.setdefault(model.fingerprint, name)) != name:
                raise ValueError(f"sources.{name}: the same model as '{other}' ({model.name}); drop one")

    def _check_texts(self) -> None:
        """Before any model is looked at. What a file holds is remembered by its hash."""
        counts: Counter[str] = Counter()
        for file in self._files:
            corpus.check_file(file)
            counts.update(
                fingerprints.remembered(
                    f"domains {file.name} {fingerprints.sha256(file)}", lambda file=file: corpus.count_domains(file)
                )
            )
        corpus.check_domains(counts, self._files, dev=self.run.corpus.dev, heldout=self.run.corpus.heldout)

    @cached_property
    def documents(self) -> list[corpus.Document]:
        return corpus.read_documents(self.corpus())

    @cached_property
    def target_vocabulary(self) -> Vocabulary:
        return Vocabulary(load_tokenizer(self.target), self.target.output_size)

    def source_vocabulary(self, name: str) -> Vocabulary:
        return Vocabulary(load_tokenizer(self.sources[name]), self.sources[name].output_size)

    def steps(self) -> list[Step]:
        """Every step of the run, and whether it is done; makes nothing but the corpus."""
        self.corpus()
        self._dry, self._steps = True, []
        self.evaluate()
        self._dry = False
        return self._steps

    def check_servers(self, last: str) -> None:
        """Try those servers that the stages up to `last` need. Raises `ValueError` if one can't do what they ask."""
        if not self.servers:
            return
        from fuselm import servers

        asking = {"capture", "evaluate"} & set(STAGES[: STAGES.index(last) + 1])
        needed = {s.name for s in self.steps() if not s.done and s.stage in asking}
        for name in sorted(needed & self.servers.keys()):
            servers.check_server(self.servers[name], self.source_vocabulary(name), top_k=self.run.capture.top_k)

    def corpus(self) -> Path:
        options = self.run.corpus
        readers: dict[str, Model] = {}  # by tokenizer; of several models, the one with the shortest context
        for model in [self.target, *self.sources.values()]:
            known = readers.setdefault(model.tokenizer_fingerprint, model)
            if model.context_length < known.context_length:
                readers[model.tokenizer_fingerprint] = model
        recipe = Recipe(
            stage="corpus",
            parameters=options.model_dump(exclude={"files"}) | {"seed": self.run.seed},
            inputs={f"file {n}": fingerprints.sha256(file) for n, file in enumerate(self._files)}
            | {f"tokenizer {t}": str(m.context_length) for t, m in readers.items()},
        )

        def build(out: Path, _: Progress) -> dict:
            return corpus.prepare(
                self._files,
                out,
                readers=[
                    corpus.Reader(
                        name=fingerprint,
                        vocabulary=Vocabulary(load_tokenizer(model), model.output_size),
                        max_tokens=model.context_length,
                    )
                    for fingerprint, model in readers.items()
                ],
                max_bytes=options.max_bytes,
                dev=options.dev,
                heldout=options.heldout,
                seed=self.run.seed,
            )

        return self._build("corpus", "", recipe, build)

    def capture(self) -> dict[str, Path]:
        return {name: self._capture(name) for name in self.sources}

    def _capture(self, name: str) -> Path:
        model, options = self.sources[name], self.run.sources[name]
        if isinstance(options, config.Captured) and options.store is not None:
            return self._existing(name, Path(options.store))
        recipe = Recipe(
            stage="capture",
            parameters={**self.run.capture.recipe, "dtype": self._dtype(name), "split": "train"},
            about={"model": model.name, "revision": options.revision},
            inputs={"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint, "corpus": self._text()},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm import capture, forward, retention

            documents = [d for d in self.documents if d.split == "train"]
            policy = retention.Policy(**self.run.capture.retention)
            if name in self.servers:
                from fuselm import remote

                vocabulary = self.source_vocabulary(name)
                return remote.capture(self.servers[name], vocabulary, documents, out, policy=policy, progress=shown)
            if self.run.capture.engine == "ray":
                from fuselm import cluster

                return cluster.capture(
                    model,
                    self.source_vocabulary(name),
                    documents,
                    out,
                    workers=self.run.capture.workers or 2,
                    revision=options.revision,
                    dtype=self._dtype(name),
                    policy=policy,
                    batch_tokens=self.run.capture.batch_tokens,
                    progress=shown,
                )
            from fuselm.models import load_model

            loaded = load_model(model, dtype=self._dtype(name))
            source = capture.Source(
                model=loaded,
                layer=forward.output_layer(loaded),
                vocabulary=self.source_vocabulary(name),
                context_token=model.context_token,
            )
            batch_tokens = self.run.capture.batch_tokens
            return capture.capture(source, documents, out, policy=policy, batch_tokens=batch_tokens, progress=shown)

        return self._build("capture", name, recipe, build)

    def _existing(self, name: str, folder: Path) -> Path:
        """A store that the user has. Raises `ValueError` if it is not of this source and these texts."""
        if folder not in self._keys:
            from fuselm import store

            model = self.sources[name]
            wanted = {"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint}
            texts = {d.id: d.text for d in self.documents if d.split == "train"}
            store.Store(folder).expect(wanted, texts, where=f"sources.{name}.store")
            self._keys[folder] = fingerprints.sha256(folder / "manifest.json")[:16]
        self._steps.append(Step(stage="capture", name=name, title=f"capture {name}", folder=folder, done=True))
        return folder

    def _dtype(self, name: str) -> str:
        options = self.run.sources[name]
        return "the server's" if isinstance(options, config.Server) else options.dtype

    def align(self) -> dict[str, Path]:
        captured = self.capture()
        return {name: self._align(name, captured[name]) for name in self.sources}

    def _align(self, name: str, captured: Path) -> Path:
        recipe = Recipe(
            stage="align",
            parameters=self.run.align.model_dump(),
            inputs={"captured": self._keys[captured], "tokenizer": self.target.tokenizer_fingerprint},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm import alignment, store

            source = store.Store(captured)
            documents = [d for d in self.documents if d.id in source]
            aligner = alignment.Aligner(
                self.source_vocabulary(name),
                self.target_vocabulary,
                **self.run.align.model_dump(),
                texts=[d.text for d in documents],
            )
            return alignment.align_store(aligner, source, documents, out, progress=shown)

        return self._build("align", name, recipe, build)

    def fuse(self) -> Path:
        aligned = self.align()
        recipe = Recipe(
            stage="fuse",
            parameters=self.run.fuse.model_dump() | {"vocabulary_size": self.target.output_size},
            inputs={f"source {name}": self._keys[path] for name, path in aligned.items()},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm import fusion, store

            stores = {name: store.Store(path) for name, path in sorted(aligned.items())}
            return fusion.fuse_stores(stores, self.documents, out, **recipe.parameters, progress=shown)

        return self._build("fuse", "", recipe, build)

    def train(self) -> dict[str, Path]:
        """The best of each method's learning rates, by the development split."""
        fused = self.fuse()
        best = {}
        for method in METHODS:
            trained = [self._train(method, fused, rate) for rate in self._learning_rates(method)]
            if self._dry:
                best[method] = trained[0]
                continue
            best[method] = min(trained, key=lambda path: manifest.read(path)["counts"]["dev_bits_per_byte"])
        return best

    def _learning_rates(self, method: str) -> list[float]:
        options = self.run.train
        chosen = options.learning_rate
        if method == "clm" and options.clm_learning_rate is not None:
            chosen = options.clm_learning_rate
        return chosen if isinstance(chosen, list) else [chosen]

    def _train(self, method: str, fused: Path, rate: float) -> Path:
        options = self.run.train.model_dump(exclude={"learning_rate", "clm_learning_rate"})
        options |= {"learning_rate": rate, "seed": self.run.seed}
        if method == "clm":
            options |= {"lambda_clm": 1.0, "lambda_final": None}
        recipe = Recipe(
            stage="train",
            parameters={"method": method, **options},
            inputs={
                "model": self.target.fingerprint,
                "tokenizer": self.target.tokenizer_fingerprint,
                "corpus": self._text(),
            }
            | ({"fused": self._keys[fused]} if method == "fused" else {}),
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm import store, training

            documents = self.documents
            return training.train(
                self.target,
                self.target_vocabulary,
                [d for d in documents if d.split == "train"],
                [d for d in documents if d.split == "dev"],
                out,
                fused=store.Store(fused) if method == "fused" else None,
                settings=training.Settings(**options),
                progress=shown,
            )

        return self._build("train", method, recipe, build, f"{method}, learning rate {rate:g}")

    def evaluate(self) -> dict[str, Path]:
        """The scores of every model on the held-out documents."""
        trained = self.train()
        models: dict[str, tuple[Callable[[], Model], str, str]] = {
            "base": (lambda: self.target, self.target.fingerprint, self.run.target.dtype)
        }
        for name, model in self.sources.items():
            models[name] = (lambda m=model: m, model.fingerprint, self._dtype(name))
        for method, path in trained.items():
            models[method] = (lambda p=path: locate(str(p / "model")), self._keys[path], self.run.target.dtype)
        scored: dict[tuple[str, str], Path] = {}
        result = {}
        for name, (model, fingerprint, dtype) in models.items():
            if (fingerprint, dtype) not in scored:  # the target may be a source as well
                scored[fingerprint, dtype] = self._evaluate(name, model, fingerprint, dtype)
            result[name] = scored[fingerprint, dtype]
        return result

    def _evaluate(self, name: str, model: Callable[[], Model], fingerprint: str, dtype: str) -> Path:
        recipe = Recipe(
            stage="evaluate",
            parameters={**self.run.evaluate.model_dump(), "dtype": dtype, "split": "heldout"},
            inputs={"model": fingerprint, "corpus": self._text()},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm import evaluation

            documents = [d for d in self.documents if d.split == "heldout"]
            located = model()
            vocabulary = Vocabulary(load_tokenizer(located), located.output_size)
            shown.start(sum(vocabulary.count_tokens([d.text for d in documents])), unit="tokens")
            scores = score(located, vocabulary, documents, shown)
            manifest.write_text(out / "scores.json", json.dumps([asdict(s) for s in scores], indent=0))
            return {"documents": len(scores), "bits_per_byte": evaluation.bits_per_byte(scores)}

        def score(located: Model, vocabulary: Vocabulary, documents: list[corpus.Document], shown: Progress) -> list:
            from fuselm import evaluation

            if name in self.servers:
                from fuselm import remote

                nats = remote.nats(self.servers[name], vocabulary, documents, advance=shown.advance)
                return evaluation.by_origin(documents, nats)
            from fuselm import forward
            from fuselm.models import load_model

            loaded = load_model(located, dtype=dtype)
            return evaluation.score(
                loaded,
                forward.output_layer(loaded),
                vocabulary,
                located.context_token,
                documents,
                batch_tokens=self.run.evaluate.batch_tokens,
                advance=shown.advance,
            )

        return self._build("evaluate", name, recipe, build)

    def report(self) -> Path:
        """The run's results in its folder: `summary.json`, `report.html` and `model`."""
        from fuselm import report

        fused, aligned, trained, scored = self.fuse(), self.align(), self.train(), self.evaluate()
        folders = {
            "corpus": self.corpus(),
            "capture": self.capture(),
            "align": aligned,
            "fuse": fused,
            "train": trained,
            "evaluate": scored,
        }
        recipe = Recipe(
            stage="report",
            parameters={"version": report.VERSION, "run": self.run.model_dump(mode="json", exclude={"output"})},
            inputs={f"{stage} {name}": self._keys[path] for stage, name, path in _flat(folders)},
        )

        def build(out: Path, _: Progress) -> dict:
            return report.write(out, self.run, folders)

        path = self._build("report", "", recipe, build)
        publish.publish(
            self.folder,
            path,
            trained["fused"] / "model",
            key=self._keys[path],
            folders={f"{stage} {name}".strip(): made for stage, name, made in _flat(folders)},
        )
        return path

    def start(self) -> None:
        """Write down what is run. Raises `ValueError` if the run's folder can't be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.write_text(
                self.folder / "config.yaml", yaml.safe_dump(self.run.model_dump(mode="json"), sort_keys=False)
            )
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot write there ({error.strerror}); set another `output`") from None

    def _text(self) -> str:
        return manifest.read(self.corpus())["files"][corpus.FILE]

    def _build(
        self, stage: str, name: str, recipe: Recipe, build: Callable[[Path, Progress], dict], title: str = ""
    ) -> Path:
        folder = self.folder / stage / f"{name}-{recipe.key}".lstrip("-")
        self._keys[folder] = recipe.key
        title = f"{stage} {title or name}".strip()
        done = manifest.is_finished(folder)
        self._steps.append(Step(stage=stage, name=name, title=title, folder=folder, done=done))
        if done or self._dry:
            return folder
        self.console.print(f"[bold]{title}[/bold]", highlight=False)
        began = time.monotonic()
        with progress.show(self.console, title) as shown:
            manifest.build_once(folder, recipe, lambda out: build(out, shown))
        self.console.print(
            f"  done in {time.monotonic() - began:,.1f} s  [dim]{folder}[/dim]", highlight=False, soft_wrap=True
        )
        self.worked = True
        return folder


def _flat(folders: dict) -> list[tuple[str, str, Path]]:
    return [
        (stage, name, path)
        for stage, paths in folders.items()
        for name, path in (paths.items() if isinstance(paths, dict) else [("", paths)])
    ]


def _server(options: config.Server) -> "servers.Server":
    from fuselm import servers

    rest = options.model_dump(exclude={"server", "model", "tokenizer"})
    return servers.find(options.server, options.model, options.tokenizer, **rest)
