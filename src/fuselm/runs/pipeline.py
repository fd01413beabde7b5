"""The stages of a run, in order: corpus, write, capture, align, fuse, train, evaluate, report.

Each method says what a stage's folder is made from and how; steps.py makes it, if it is not there. `run.json` in the
run's folder says which folders belong to its last run file.
"""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from fuselm.documents import corpus
from fuselm.models.model import Model, load_vocabulary, locate
from fuselm.runs import config, publish, run_precision
from fuselm.runs.inputs import Inputs
from fuselm.runs.run_precision import RunPrecision
from fuselm.runs.steps import Step, Steps
from fuselm.system import fingerprints, manifest, processes
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly
from fuselm.training import needs

STAGES = ("corpus", "write", "capture", "align", "fuse", "train", "evaluate", "report")
METHODS = ("clm", "fused")
OF_FUSED_ROWS = (  # nothing to the causal-LM baseline
    "lambda_final",
    "confidence",
    "divergence",
    "jsd_beta",
    "temperature",
    "tail",
)
WEIGHTS = "model"  # folder of a trained model in its stage's


class Pipeline:
    """One run. A stage is a method that makes the stages before it, then its own folders, and returns their paths."""

    def __init__(self, run: config.Run, console: Console, *, precision_file: Path | None = None):
        self.run = run
        self.folder = Path(run.output)
        self.console = console
        self.inputs = Inputs(run)
        self.precision = RunPrecision(run, precision_file or self.folder / run_precision.FILE)
        self._steps = Steps(self.folder, console, begin=lambda: self.precision.begin(self.local_models))
        self._expected: set[Path] = set()  # stores of the user's that are of this run's texts

    @cached_property
    def documents(self) -> list[corpus.Document]:
        return corpus.read_documents(self.corpus())

    @property
    def learnt(self) -> list[corpus.Document]:
        """What fused distributions are of: the training documents, and what sources wrote."""
        written = [d for path in self.write().values() for d in corpus.read_documents(path)]
        return [d for d in self.documents if d.split == "train"] + written

    def steps(self, making: Callable[[], object] | None = None) -> list[Step]:
        """Every step of `making` something, else of the whole run, and whether it is done; makes nothing but the
        corpus.
        """
        self.corpus()
        return self._steps.of(making or self.evaluate)

    @property
    def worked(self) -> bool:
        """Whether anything was made that was not there."""
        return self._steps.worked

    @property
    def local_models(self) -> dict[str, Model]:
        """The models that this run loads, by role."""
        sources = {f"source {n}": m for n, m in self.inputs.sources.items() if n not in self.inputs.servers}
        return {"target": self.inputs.target} | sources

    def check(self, last: str, making: Callable[[], object] | None = None) -> None:
        """Try what the stages up to `last` of `making` something, else of the whole run, need that is no file of the
        run: servers, and what training takes. Raises `ValueError` on what can't do what is asked of it.
        """
        todo = [s for s in self.steps(making) if not s.done and STAGES.index(s.stage) <= STAGES.index(last)]
        for name in sorted({s.name for s in todo if s.stage in ("capture", "evaluate")} & self.inputs.servers.keys()):
            from fuselm.sources.servers import server as servers

            servers.check_server(
                self.inputs.servers[name], self.inputs.source_vocabulary(name), top_k=self.run.capture_of(name).top_k
            )
        if any(s.stage in ("write", "capture") for s in todo):  # hours, after which a store would be found wrong
            self._check_stores()
        if any(s.stage == "train" for s in todo):
            needs.check_training(
                self.inputs.target,
                **self.run.train.model_dump(include={"trackers", "lora_rank", "lora_modules", "quantize"}),
            )
        if processes.rank() == 0 and any(s.stage in ("write", "capture", "train", "evaluate") for s in todo):
            self._try_models()

    def _try_models(self) -> None:
        """Try the target and every source that a run loads, before the first of them is read."""
        from fuselm.models import probe

        probe.try_all([(model, self.precision.dtype(role, model)) for role, model in self.local_models.items()])

    def corpus(self) -> Path:
        options = self.run.corpus
        inputs = self.inputs
        recipe = Recipe(
            stage="corpus",
            parameters=options.model_dump(exclude={"files"}) | {"seed": self.run.seed},
            inputs=inputs.identities | inputs.contexts,
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.results import notes

            counts = corpus.prepare(
                inputs.files,
                out,
                domains=inputs.file_domains,
                readers=inputs.readers(),
                max_bytes=options.max_bytes,
                dev=options.dev,
                heldout=options.heldout,
                share=options.share,
                seed=self.run.seed,
                progress=shown,
            )
            for tokenizer, found in counts.get("unspelled", {}).items():
                name = inputs.name_readers(tokenizer)
                shown.note(notes.describe_unspelled_text(name, found, is_learned_from=True))
            return counts

        return self._steps.make("corpus", "", recipe, build)

    def written(self, name: str) -> float:
        """Bytes that a source writes for each byte of the training documents, those of a domain being alike."""
        size = self.inputs.writers.get(name, 0.0)
        if not isinstance(size, dict):
            return size
        counts = manifest.read(self.corpus())["counts"]["documents"]
        of_domains = {domain: counts.get(f"{domain}/train", 0) for domain in self.inputs.domains}
        return sum(of_domains[d] * of for d, of in size.items()) / sum(of_domains.values())

    def write(self) -> dict[str, Path]:
        self.corpus()
        return {name: self._write(name) for name in self.inputs.writers}

    def _write(self, name: str) -> Path:
        model, options = self.inputs.sources[name], self.run.write
        asked = {
            "size": self.inputs.writers[name],
            "prompt_tokens": options.prompt_tokens,
            "tokens": options.tokens,
            "min_p": options.min_p,
            "seed": self.run.seed,
        }
        recipe = Recipe(
            stage="write",
            parameters={**asked, "name": name, "dtype": self._dtype(name)},
            about={"model": name_publicly(model.name), "revision": self.run.sources[name].revision},
            inputs={"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint, "corpus": self._text()}
            | self.inputs.contexts,
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.sources import capture, writing

            dtype = self._read_dtype(name, out)
            source = capture.load(model, self.inputs.source_vocabulary(name), dtype=dtype)
            documents = [d for d in self.documents if d.split == "train"]
            readers = self.inputs.readers()
            counts = writing.write(source, documents, out, readers=readers, name=name, **asked, progress=shown)
            return counts | {"dtype": dtype}

        return self._steps.make("write", name, recipe, build)

    def _learnt(self) -> dict[str, str]:
        """What identifies the documents that are learnt from."""
        written = {f"written by {name}": self._steps.key(path) for name, path in self.write().items()}
        return {"corpus": self._text()} | written

    def capture(self) -> dict[str, Path]:
        return {name: self._capture(name) for name in self.inputs.sources}

    def _capture(self, name: str) -> Path:
        model, options = self.inputs.sources[name], self.run.sources[name]
        if isinstance(options, config.Captured) and options.store is not None:
            return self._existing(name, Path(options.store))
        recipe = Recipe(
            stage="capture",
            parameters={
                **self.run.capture_of(name).recipe,
                "temperature": 1.0,
                "dtype": self._dtype(name),
                "split": "train",
            },
            about={"model": name_publicly(model.name), "revision": options.revision},
            inputs={"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint, **self._learnt()},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.sources import capture
            from fuselm.stores import retention

            documents = self.learnt
            vocabulary = self.inputs.source_vocabulary(name)
            asked = {"policy": retention.Policy(**self.run.capture_of(name).retention), "progress": shown}
            if name in self.inputs.servers:
                from fuselm.sources.servers import remote

                return remote.capture_from_server(self.inputs.servers[name], vocabulary, documents, out, **asked)
            asked["prefix_tokens"] = self.run.capture.prefix_tokens
            asked["batch_tokens"] = self.run.capture.batch_tokens
            dtype = self._read_dtype(name, out)
            if self.run.capture.engine == "ray":
                from fuselm.sources import ray_workers

                asked |= {"workers": self.run.capture.processes, "revision": options.revision}
                counts = ray_workers.capture_on_ray(model, vocabulary, documents, out, dtype=dtype, **asked)
                return counts | {"dtype": dtype}
            source = capture.load(model, vocabulary, dtype=dtype)
            return capture.capture(source, documents, out, **asked) | {"dtype": dtype}

        return self._steps.make("capture", name, recipe, build)

    def _existing(self, name: str, folder: Path) -> Path:
        """A store that the user has. Raises `ValueError` if it is not of this source and these texts."""
        is_written = all(manifest.is_finished(path) for path in self.write().values())
        if folder not in self._expected:
            from fuselm.stores import store

            model = self.inputs.sources[name]
            found = store.Store(folder, vocabulary_size=model.output_size)
            wanted = {"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint}
            if is_written:  # else it is not known yet what is to be in it
                found.expect(wanted, {d.id: d.text for d in self.learnt}, where=f"sources.{name}.store")
                self._expected.add(folder)
        return self._steps.take("capture", name, folder, fingerprints.sha256(folder / "manifest.json")[:16])

    def _check_stores(self) -> None:
        """Read all rows of the user's stores that are not known to be sound. Raises `ValueError`."""
        from fuselm.stores import store

        for name, options in self.run.sources.items():
            if isinstance(options, config.Captured) and options.store is not None:
                size = self.inputs.sources[name].output_size
                store.Store(Path(options.store), vocabulary_size=size).check()

    def _dtype(self, name: str) -> str:
        options = self.run.sources[name]
        return "the server's" if isinstance(options, config.Server) else options.dtype

    def _read_dtype(self, name: str, out: Path) -> str:
        """Return what a source is read in: as its folder, which may be an interrupted one, or else its run began."""
        model = self.inputs.sources[name]
        return run_precision.keep_dtype(out, self.precision.dtype(f"source {name}", model), model)

    def align(self, *, draws: bool | None = None) -> dict[str, Path]:
        """Of rows with what was drawn of them, or without; None: as the run fuses them."""
        captured = self.capture()
        draws = self.run.only_averages if draws is None else draws
        return {name: self._align(name, captured[name], draws) for name in self.inputs.sources}

    def _align(self, name: str, captured: Path, draws: bool) -> Path:
        # Versions that took strings for what tokens spell aligned these wrongly, under the key without it.
        is_corrected = any(map(self.inputs.is_corrected, (self.inputs.sources[name], self.inputs.target)))
        recipe = Recipe(
            stage="align",
            parameters=self.run.align.model_dump()
            | {"draws": draws}
            | ({"token_bytes": "decoded"} if is_corrected else {}),
            inputs={"captured": self._steps.key(captured), "tokenizer": self.inputs.target.tokenizer_fingerprint},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.alignment import aligner as alignment
            from fuselm.stores import store

            source = store.Store(captured, draws=draws, vocabulary_size=self.inputs.sources[name].output_size)
            documents = [d for d in self.learnt if d.id in source]
            aligner = alignment.Aligner(
                self.inputs.source_vocabulary(name),
                self.inputs.target_vocabulary,
                **self.run.align.model_dump(),
                texts=[d.text for d in documents],
            )
            return alignment.align_store(aligner, source, documents, out, progress=shown)

        return self._steps.make("align", name, recipe, build)

    def fuse(self) -> Path:
        aligned = self.align()
        recipe = Recipe(
            stage="fuse",
            parameters=self.run.fuse.recipe | {"vocabulary_size": self.inputs.target.output_size},
            inputs={f"source {name}": self._steps.key(path) for name, path in aligned.items()},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.fusion import fuse as fusion
            from fuselm.stores import store

            size = self.inputs.target.output_size
            stores = {name: store.Store(path, vocabulary_size=size) for name, path in sorted(aligned.items())}
            return fusion.fuse_stores(
                stores,
                self.learnt,
                out,
                learn_from={d.id for d in self.documents},
                **recipe.parameters,
                progress=shown,
            )

        return self._steps.make("fuse", "", recipe, build)

    def train(self) -> dict[str, Path]:
        self.fuse()
        return {method: self.trained(method) for method in METHODS}

    def trained(self, method: str, *, weights: bool = True) -> Path:
        """The best of a method's learning rates, by the development split. A model whose weights were dropped is
        trained again, if they are wanted.
        """
        rates = self.run.train.of(method).learning_rates
        folders = [self._train(method, rate) for rate in rates]
        if not all(map(manifest.is_finished, folders)):  # only looking
            return folders[0]
        scores = [manifest.read(folder)["counts"]["dev_bits_per_byte"] for folder in folders]
        best = scores.index(min(scores))
        if weights and not self._steps.looking and not (folders[best] / WEIGHTS).is_dir():
            manifest.reopen(folders[best])
            self._train(method, rates[best])
        return folders[best]

    def settings(self, method: str, rate: float, *, precision: str | None = None) -> dict[str, Any]:
        """Return `training.Settings` of one training; `precision` in place of the run's own."""
        options = self.run.train.of(method).model_dump(exclude={"learning_rate", "clm"})
        options |= {"learning_rate": rate, "seed": self.run.seed}
        options["precision"] = precision or self.precision.training(looking=self._steps.looking)
        if method == "clm":
            options |= {name: config.Train.model_fields[name].default for name in OF_FUSED_ROWS} | {"lambda_clm": 1.0}
        return options

    def _train(self, method: str, rate: float) -> Path:
        fused, settings = self.fuse() if method == "fused" else None, self.settings(method, rate)
        recipe = Recipe(
            stage="train",
            parameters={"method": method, **{name: of for name, of in settings.items() if name != "trackers"}},
            inputs={
                "model": self.inputs.target.fingerprint,
                "tokenizer": self.inputs.target.tokenizer_fingerprint,
                **({"corpus": self._text()} if fused is None else self._learnt() | {"fused": self._steps.key(fused)}),
            },
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.stores import store
            from fuselm.training import batches
            from fuselm.training import train as training

            kept = {"keep_tokens": batches.KEPT_TOKENS, "vocabulary_size": self.inputs.target.output_size}
            rows = None if fused is None else store.Store(fused, **kept)
            documents = [d for d in self.documents if d.split == "train"]
            return training.train(
                self.inputs.target,
                self.inputs.target_vocabulary,
                documents if rows is None else [d for d in self.learnt if d.id in rows],
                [d for d in self.documents if d.split == "dev"],
                out,
                fused=rows,
                settings=training.Settings(**settings),
                progress=shown,
            )

        return self._steps.make("train", method, recipe, build, f"{method}, learning rate {rate:g}", together=True)

    def evaluate(self) -> dict[str, Path]:
        """The scores of every model on the held-out documents."""
        self.train()
        return {name: self.scored(name) for name in ("base", *self.inputs.sources, *METHODS)}

    def scored(self, name: str) -> Path:
        """The scores of `base`, a source or a method's best model."""
        model, dtype, role = self.inputs.target, self.run.target.dtype, "target"
        fingerprint = model.fingerprint
        tokenizer = model.tokenizer_fingerprint
        if name in METHODS:
            fingerprint = self._steps.key(self.trained(name, weights=False))
        elif name in self.inputs.sources:
            source, of_source = self.inputs.sources[name], self._dtype(name)
            if (source.fingerprint, source.tokenizer_fingerprint, of_source) == (fingerprint, tokenizer, dtype):
                name = "base"
            else:
                role = f"source {name}"
            model, fingerprint, tokenizer, dtype = source, source.fingerprint, source.tokenizer_fingerprint, of_source
        recipe = Recipe(
            stage="evaluate",
            parameters={**self.run.evaluate.model_dump(), "dtype": dtype, "split": "heldout"},
            inputs={"model": fingerprint, "tokenizer": tokenizer, "corpus": self._text()},
        )

        def build(out: Path, shown: Progress) -> dict:
            from fuselm.results import measure, scoring

            located = locate(str(self.trained(name) / WEIGHTS)) if name in METHODS else model
            read_in = dtype if name in self.inputs.servers else self.precision.dtype(role, located)
            scores = measure.score(
                located,
                load_vocabulary(located),
                [d for d in self.documents if d.split == "heldout"],
                dtype=read_in,
                batch_tokens=self.run.evaluate.batch_tokens,
                progress=shown,
                server=self.inputs.servers.get(name),
            )
            manifest.write_text(out / "scores.json", json.dumps([s.as_row() for s in scores], indent=0))
            return {"documents": len(scores), "bits_per_byte": scoring.compute_bits_per_byte(scores), "dtype": read_in}

        return self._steps.make("evaluate", name, recipe, build)

    def report(self) -> Path:
        """The run's results in its folder: `summary.json`, `report.html` and `model`."""
        from fuselm.results import report, run_summary

        options = self.run.model_dump(mode="json")
        fused, aligned, trained, scored = self.fuse(), self.align(), self.train(), self.evaluate()
        folders = {
            "corpus": self.corpus(),
            "write": self.write(),
            "capture": self.capture(),
            "align": aligned,
            "fuse": fused,
            "train": trained,
            "evaluate": scored,
        }
        recipe = Recipe(
            stage="report",
            parameters={"version": report.VERSION, "run": run_summary.select_public_options(options)},
            inputs={f"{stage} {name}": self._steps.key(path) for stage, name, path in _flat(folders)},
        )

        def build(out: Path, _: Progress) -> dict:
            return report.write_report(out, options, folders)

        path = self._steps.make("report", "", recipe, build)
        if processes.rank() == 0:
            publish.publish(
                self.folder,
                path,
                trained["fused"] / WEIGHTS,
                key=self._steps.key(path),
                folders={f"{stage} {name}".strip(): made for stage, name, made in _flat(folders)},
            )
        return path

    def start(self) -> None:
        """Write down what is run. Raises `ValueError` if the run's folder can't be written to."""
        if processes.rank() > 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.write_text(
                self.folder / "config.yaml", yaml.safe_dump(self.run.model_dump(mode="json"), sort_keys=False)
            )
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot write there ({error.strerror}); set another `output`") from None

    def _text(self) -> str:
        return manifest.read(self.corpus())["files"][corpus.FILE]


def _flat(folders: dict) -> list[tuple[str, str, Path]]:
    return [
        (stage, name, path)
        for stage, paths in folders.items()
        for name, path in (paths.items() if isinstance(paths, dict) else [("", paths)])
    ]
