"""Read what a run is made of, its texts, its target and its sources, before anything is made of them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselm.documents import corpus, fetched_datasets, text_files, texts
from fuselm.documents.cutting import Reader
from fuselm.fusion import priors
from fuselm.models import token_bytes
from fuselm.models.chat.templates import has_template
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.runs import config
from fuselm.runs.dialogue_options import DialogueOptions, check_unused
from fuselm.runs.options.merging import OtherModelOptions
from fuselm.runs.options.sources import LocalSourceOptions
from fuselm.system import fingerprints, progress

if TYPE_CHECKING:
    from fuselm.sources.servers.connection import Server


class Inputs:
    """Hold a run's texts, target and sources. Creating it raises `ValueError` if any of them cannot be used."""

    def __init__(self, run: config.RunOptions):
        found = text_files.find_files(run.corpus.files)
        self.repeated_files = text_files.find_copies(found, run.corpus.files)  # which are not read
        self.files = [file for file in found if file not in self.repeated_files]
        self.file_columns = [run.corpus.columns] * len(self.files)
        if run.corpus.dataset is not None:
            request = fetched_datasets.DatasetRequest(**run.corpus.dataset.model_dump())
            self.files.append(fetched_datasets.fetch_dataset(request))
            self.file_columns.append({})
        self._check_texts(run.corpus)
        if self.has_dialogues and run.evaluate.prefix_tokens:
            raise ValueError("evaluate.prefix_tokens: conversations are scored by themselves; drop it")
        self.target = locate_model(run.target.model, revision=run.target.revision)
        self.servers = {
            name: _build_server(s) for name, s in run.sources.items() if isinstance(s, config.ServerOptions)
        }
        self.sources = {
            name: self.servers[name].model
            if isinstance(s, config.ServerOptions)
            else locate_model(s.model, revision=s.revision)
            for name, s in run.sources.items()
        }
        self._source_vocabularies: dict[str, Vocabulary] = {}
        self._check_sources()
        self.copies = self._list_copies() if run.fuse.pairwise else []
        merge = run.merging
        self.merged = {} if merge is None else {n: _locate_other(other) for n, other in merge.models.items()}
        self.merge_base = self.target if merge is None or merge.base is None else _locate_other(merge.base)
        self._check_merge(run)
        self._dialogues = DialogueOptions(run, self.target) if self.has_dialogues else None
        if self._dialogues is None:
            check_unused(run)
        else:
            self._dialogues.check_use([self.target, *self.sources.values()])
        self.writers = self._resolve_writers(run.write)
        self.answerers = self._resolve_answerers(run.write)
        self._check_weights(run.fuse)

    @cached_property
    def target_vocabulary(self) -> Vocabulary:
        """Return the target's vocabulary, which reads conversations if the corpus has any."""
        return self._load_vocabulary("target", self.target)

    def load_source_vocabulary(self, name: str) -> Vocabulary:
        """Return a source's vocabulary, which is loaded once: a large one takes seconds."""
        if name not in self._source_vocabularies:
            self._source_vocabularies[name] = self._load_vocabulary(f"source {name}", self.sources[name])
        return self._source_vocabularies[name]

    def load_trained_vocabulary(self, model: Model) -> Vocabulary:
        """Return the vocabulary of a model that was trained from the target."""
        return self._load_vocabulary("target", model)

    def _load_vocabulary(self, role: str, model: Model) -> Vocabulary:
        vocabulary = load_vocabulary(model)
        return vocabulary if self._dialogues is None else self._dialogues.add_template(role, model, vocabulary)

    def identify_chat(self, role: str) -> dict[str, str]:
        """Return what identifies how a model reads conversations, for recipes; nothing if there are none.

        `role` is `target` or `source NAME`.
        """
        if self._dialogues is None:
            return {}
        name = role.removeprefix("source ")
        vocabulary = self.target_vocabulary if role == "target" else self.load_source_vocabulary(name)
        return {"chat": vocabulary.chat_fingerprint or ""}

    def is_corrected(self, model: Model) -> bool:
        """Tell whether tokens of a model stand for other bytes than their strings seem to spell; remembered."""
        return fingerprints.recall_or_compute(
            f"corrected {token_bytes.FORMAT} {model.tokenizer_fingerprint} {model.output_size}",
            lambda: load_vocabulary(model).is_corrected,
        )

    def list_fused_sources(self, copy: str | None = None) -> list[str]:
        """Return the sources that are fused: all, or for a copy of the target its own and the target itself."""
        return [n for n, m in self.sources.items() if copy in (None, n) or m.fingerprint == self.target.fingerprint]

    @property
    def contexts(self) -> dict[str, str]:
        """Return what identifies the readers of `list_readers`, for recipes."""
        found = {
            f"tokenizer {name}": str(model.context_length) for name, model in self._find_shortest_contexts().items()
        }
        if self._dialogues is None:
            return found
        readers = self._list_dialogue_readers()
        return found | {f"chat {r.vocabulary.chat_fingerprint}": str(r.max_tokens) for r in readers}

    @property
    def identities(self) -> dict[str, str]:
        """Return what identifies the texts: names and hashes of files, and domains that differ from the file's name."""
        named = zip(self.files, self.file_domains, strict=True)
        return {
            f"file {n}": f"{file.name} {fingerprints.hash_file_once(file)}"
            + ("" if domain == text_files.strip_endings(file) else f" {domain}")
            for n, (file, domain) in enumerate(named)
        }

    def list_readers(self) -> list[Reader]:
        """Return one reader for each tokenizer, or for each way to read conversations; every document must fit all."""
        if self._dialogues is not None:
            return self._list_dialogue_readers()
        return [
            Reader(
                name=name,
                vocabulary=load_vocabulary(model),
                max_tokens=model.context_length,
            )
            for name, model in self._find_shortest_contexts().items()
        ]

    def _list_dialogue_readers(self) -> list[Reader]:
        """Return one reader for each way to read conversations, the first of a tokenizer under its fingerprint."""
        models = {"target": self.target} | {f"source {name}": model for name, model in self.sources.items()}
        readers: dict[str, Reader] = {}
        for role, model in models.items():
            vocabulary = self.target_vocabulary if role == "target" else self.load_source_vocabulary(role[7:])
            found = readers.get(vocabulary.chat_fingerprint or "")
            length = model.context_length if found is None else min(model.context_length, found.max_tokens)
            taken = {reader.name for key, reader in readers.items() if key != vocabulary.chat_fingerprint}
            tokenizer = model.tokenizer_fingerprint
            name = f"{tokenizer} {vocabulary.chat_fingerprint}" if tokenizer in taken else tokenizer
            readers[vocabulary.chat_fingerprint or ""] = Reader(name=name, vocabulary=vocabulary, max_tokens=length)
        return list(readers.values())

    def find_reader(self, role: str) -> str:
        """Return the name of the reader of `list_readers` that reads as `target` or `source NAME` does."""
        name = role.removeprefix("source ")
        if self._dialogues is None:
            return (self.target if role == "target" else self.sources[name]).tokenizer_fingerprint
        vocabulary = self.target_vocabulary if role == "target" else self.load_source_vocabulary(name)
        readers = self._list_dialogue_readers()
        return next(r.name for r in readers if r.vocabulary.chat_fingerprint == vocabulary.chat_fingerprint)

    def name_readers(self, tokenizer: str) -> str:
        """Name the target and the sources that have this tokenizer, given by its fingerprint."""
        models, tokenizer = {"target": self.target} | self.sources, tokenizer.partition(" ")[0]
        return ", ".join(name for name, model in models.items() if model.tokenizer_fingerprint == tokenizer)

    def _find_shortest_contexts(self) -> dict[str, Model]:
        """Return for each tokenizer the model with the shortest context."""
        result: dict[str, Model] = {}
        for model in [self.target, *self.sources.values()]:
            known = result.setdefault(model.tokenizer_fingerprint, model)
            if model.context_length < known.context_length:
                result[model.tokenizer_fingerprint] = model
        return result

    def _check_texts(self, options: config.CorpusOptions) -> None:
        """Check the files of texts before any model is opened. A file's counts are remembered by its hash."""
        counts: dict[str, Counter[str]] = {}
        columns = dict(zip(self.files, self.file_columns, strict=True))
        if options.columns and all(text_files.find_kind(f) in text_files.PLAIN for f in self.files if columns[f]):
            raise ValueError("corpus.columns: does nothing here, because every file is plain text; drop it")
        is_lax = options.bad_rows == "skip"
        self.file_domains = text_files.name_domains(
            self.files,
            lambda file: _count_documents(file, text_files.strip_endings(file), columns[file], is_lax)["domains"],
        )
        self.has_dialogues, has_texts = False, False
        for file, domain in zip(self.files, self.file_domains, strict=True):
            found = _count_documents(file, domain, columns[file], is_lax)
            self.has_dialogues |= found["dialogues"] > 0
            has_texts |= found["texts"] > 0
            for name, in_file in found["domains"].items():
                counts.setdefault(name, Counter()).update(in_file)
        self.has_texts = has_texts
        corpus.check_domains(counts, self.files, dev=options.dev, heldout=options.heldout)
        self.domain_counts = counts
        self.domains = sorted(counts)

    def _resolve_writers(self, options: config.WriteOptions) -> dict[str, float | dict[str, float]]:
        """Return the bytes that each source writes for one byte of training documents, in all domains or by domain."""
        if isinstance(options.ratio, dict):
            writers = {name: ratio for name, ratio in sorted(options.ratio.items()) if ratio}
        else:
            candidates = self.list_local_sources()
            if options.ratio and not candidates:
                raise ValueError(
                    "write.ratio: no source can write, because all are servers or the target; name one, {name: 1}"
                )
            writers = {name: options.ratio / len(candidates) for name in candidates if options.ratio}
        if writers and not self.has_texts:
            raise ValueError(
                "write.ratio: sources write after plain texts, and all rows are conversations; leave it out"
            )
        for name, ratio in writers.items():
            for domain in set(ratio if isinstance(ratio, dict) else ()) - set(self.domains):
                known = ", ".join(self.domains)
                raise ValueError(f"write.ratio.{name}: no text has the domain '{domain}'; the domains are {known}")
            context = self.sources[name].context_length
            if _count_window_tokens(options) > context:
                raise ValueError(
                    f"write.tokens: {name} reads {context} tokens, too few for a prompt of {options.prompt_tokens} and "
                    f"{options.tokens} more; lower write.tokens or write.prompt_tokens"
                )
        return writers

    def _resolve_answerers(self, options: config.WriteOptions) -> dict[str, int]:
        """Return how often each source answers each training conversation."""
        if isinstance(options.answers, dict):
            found = {name: count for name, count in sorted(options.answers.items()) if count}
        else:
            candidates = [name for name in self.list_local_sources() if has_template(self.sources[name])]
            if options.answers and not candidates:
                raise ValueError(
                    "write.answers: no source can answer, because none of those that run here has a chat template; "
                    "name one, {name: 4}"
                )
            found = dict.fromkeys(candidates, options.answers) if options.answers else {}
        if found and not self.has_dialogues:
            raise ValueError("write.answers: does nothing here, because the texts have no conversation; drop it")
        return found

    def list_local_sources(self) -> list[str]:
        """Return the sources that are neither servers nor the target."""
        others = [n for n, m in self.sources.items() if m.fingerprint != self.target.fingerprint]
        return sorted(set(others) - set(self.servers))

    def list_possible_writers(self, run: config.RunOptions) -> list[str]:
        """Return the sources that can write; none if a source is a store, which cannot contain new text."""
        if any(isinstance(s, LocalSourceOptions) and s.store is not None for s in run.sources.values()):
            return []
        return [
            name
            for name in self.list_local_sources()
            if _count_window_tokens(run.write) <= self.sources[name].context_length
        ]

    def _list_copies(self) -> list[str]:
        """Return the sources that are not the target: each of them is fused into a copy of it."""
        return [name for name, model in self.sources.items() if model.fingerprint != self.target.fingerprint]

    def _check_merge(self, run: config.RunOptions) -> None:
        if run.merging is None:
            return
        names = run.merging.name_models(self.copies or [config.FUSED])
        if len(names) < 2 and not run.merging.changes_one:
            raise ValueError(
                f"fuse.pairwise: merges copies of the target, and there is one ({names[0]}); name another source, or "
                "models in merge.models"
            )
        for name, model in self.merged.items():
            if run.merging.takes_base and model.fingerprint == self.merge_base.fingerprint:
                raise ValueError(
                    f"merge.models.{name}: is the base, so it has no difference to merge; drop it, or name another "
                    "merge.base"
                )
        run.merging.write_recipe({name: name for name in names}, "base", run.seed)

    def _check_weights(self, options: config.FuseOptions) -> None:
        given = options.weights if isinstance(options.weights, dict) else {}
        for copy in self.copies or [None]:
            names = self.list_fused_sources(copy)
            priors.spread_weights({n: given[n] for n in names if n in given}, names, self.domains)

    def _check_sources(self) -> None:
        first: dict[str, str] = {}
        for name, model in self.sources.items():
            if (other := first.setdefault(model.fingerprint, name)) != name:
                raise ValueError(f"sources.{name}: the same model as '{other}' ({model.name}); drop one")


def _locate_other(other: OtherModelOptions) -> Model:
    return locate_model(other.model, revision=other.revision)


def _count_documents(file: Path, domain: str, columns: Mapping[str, str], is_lax: bool) -> dict[str, Any]:
    """Count a file's documents by domain, its texts and its dialogues, once for a file that stays as it is.

    A lax count skips bad rows.
    """
    renamed = (f" {sorted(columns.items())}" if columns else "") + (" lax" if is_lax else "")

    def count() -> dict[str, Any]:
        rows = texts.read_texts(file, domain, columns, skip=(lambda problem: None) if is_lax else None)
        kinds: Counter[bool] = Counter()

        def count_kinds() -> Iterator[texts.TextRow]:
            for row in rows:
                kinds[isinstance(row.text, str)] += 1
                yield row

        return {"domains": corpus.count_domains(count_kinds()), "dialogues": kinds[False], "texts": kinds[True]}

    with progress.announce(f"reading {file.name}, once, to count its documents"):
        return fingerprints.recall_or_compute(
            f"rows 2 {file.name} {domain} {fingerprints.hash_file_once(file)}{renamed}", count
        )


def _count_window_tokens(options: config.WriteOptions) -> int:
    """Return how many tokens a source reads and writes at a time; one is the context token."""
    return 1 + options.prompt_tokens + options.tokens


def _build_server(options: config.ServerOptions) -> "Server":
    from fuselm.sources.servers.connection import find_server

    rest = options.model_dump(exclude={"server", "model", "tokenizer", "system"})
    return find_server(options.server, options.model, options.tokenizer, **rest)
