"""Merge models into a folder that `from_pretrained` loads, tensor by tensor and block by block.

Memory holds a block of each model, whatever their size. A shard that was finished is not made again after an
interruption. What cannot be merged is named before anything is written.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fuselm.documents.corpus import Document
from fuselm.models.loading import load_tokenizer, load_vocabulary
from fuselm.models.locating import Model, locate_model
from fuselm.models.merging import tensor_files
from fuselm.models.merging.blocks import Models
from fuselm.models.merging.choices import METHODS
from fuselm.models.merging.compatibility import compare_models, find_vocabulary_tensors
from fuselm.models.merging.methods import begin_merge
from fuselm.models.merging.tensor_files import Shard, TensorFolder
from fuselm.models.merging.vocabularies import UnitedVocabulary, read_united_rows, unite_vocabularies
from fuselm.models.tokenizer_files import digest_files
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.pages.rendering import render_template
from fuselm.runs.merging.recipe import MergeOptions
from fuselm.system import atomic_files, manifest
from fuselm.system.background import read_ahead
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.public_names import name_publicly
from fuselm.training.companions import copy_companions

BLOCK = 1 << 18  # elements of a block of a model, 1 MiB in float32
HELD = 1 << 26  # elements of a tensor of all models, 256 MiB in float32, that are read once and not for every pass
LAYER = re.compile(r"\.(\d+)\.")  # the number of a tensor's layer, the first number in its name


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Hold models that were found to fit, and what the result will have."""

    options: MergeOptions
    folders: Sequence[TensorFolder]
    vocabulary: UnitedVocabulary
    vocabulary_tensors: Sequence[str]
    embeddings: Sequence[str]
    tensors: dict[str, tuple[tuple[int, ...], str]]  # shape and type of those that are merged
    shares: Callable[[str], Sequence[float]] | None = None  # of a soup, by tensor
    like: TensorFolder  # its configuration, tokenizer and templates are the result's
    notes: Sequence[str]

    @property
    def parameters(self) -> int:
        """Count the numbers of the merged tensors."""
        return sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())

    @property
    def size(self) -> int:
        """Return the bytes that the merged tensors will have on disk."""
        return sum(tensor_files.count_bytes(*described) for described in self.tensors.values())


def plan_merge(options: MergeOptions, *, like: Model | None = None) -> MergePlan:
    """Open the models and compare them. Raises `ValueError`, one line, if they cannot be merged.

    The result has the configuration, tokenizer and templates of the first model, or of `like`, which must have the same
    tokens then as all that are merged.
    """
    folders = [
        TensorFolder(locate_model(m.model, revision=m.revision), None if m.adapter is None else Path(m.adapter))
        for m in options.inputs
    ]
    embeddings, outputs = find_vocabulary_tensors(folders[0])
    for folder in folders:
        if folder.config.get("tie_word_embeddings"):  # a copy of the embeddings, which some checkpoints have
            for name in outputs:
                folder.tensors.pop(name, None)
    vocabulary_tensors = [name for name in (*embeddings, *outputs) if name in folders[0].tensors]
    comparison = compare_models(folders, vocabulary_tensors)
    if comparison.obstacles:
        raise ValueError(f"{'; '.join(comparison.obstacles)}: these cannot be merged; fuse them instead")
    vocabulary = unite_vocabularies([folder.model for folder in folders])
    if like is not None:
        alike = unite_vocabularies([like, *(folder.model for folder in folders)])
        if not alike.is_shared:
            raise ValueError(f"{like.name} and the models to merge have other tokens; merge models with the same ones")
    if options.tokenizer == "base":
        rows = folders[0].model.output_size
        vocabulary = UnitedVocabulary(rows=rows, places=[place[:rows] for place in vocabulary.places], added=[])
    tensors = {}
    for name, info in folders[0].tensors.items():
        shape = (vocabulary.rows, *info.shape[1:]) if name in vocabulary_tensors else info.shape
        tensors[name] = (shape, options.dtype or info.dtype)
    return MergePlan(
        options=options,
        folders=folders,
        vocabulary=vocabulary,
        vocabulary_tensors=vocabulary_tensors,
        embeddings=embeddings,
        tensors=tensors,
        like=folders[0] if like is None else TensorFolder(like),
        notes=comparison.notes,
    )


def make_merge(
    plan: MergePlan,
    out: Path,
    progress: Progress,
    *,
    documents: Sequence[Document] = (),
    vocabulary: Vocabulary | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> bool:
    """Write the merged model to `out`; return False if it is there already. Resume what was interrupted.

    A soup's weights are chosen on `documents`, which `vocabulary` reads.
    """
    free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
    if free < plan.size:
        raise ValueError(f"{out}: needs {plan.size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; free some space")
    recipe = Recipe(
        stage="merge",
        parameters={
            **plan.options.model_dump(exclude={"models", "base", "texts"}),
            "models": _describe_models(plan.options),
        },
        inputs={f"model {n}": _fingerprint(folder, m) for n, (folder, m) in enumerate(_pairs(plan))}
        | ({"texts": _hash_texts(documents)} if documents else {}),
    )
    return manifest.build_once(out, recipe, partial(_build, plan, progress, shard_bytes, documents, vocabulary))


def _hash_texts(documents: Sequence[Document]) -> str:
    told = hashlib.sha256()
    for document in documents:
        told.update(f"{document.domain}\0{document.text}\0".encode(errors="surrogatepass"))
    return told.hexdigest()[:16]


def write_merged_model(
    plan: MergePlan, out: Path, progress: Progress, *, shard_bytes: int = tensor_files.SHARD_BYTES
) -> None:
    """Write weights, configuration, tokenizer and templates. Shards that are whole already are not made again."""
    out.mkdir(parents=True, exist_ok=True)
    shards, index = tensor_files.plan_shards(plan.tensors, shard_bytes)
    progress.start(total=plan.parameters, unit="parameters")
    for shard in shards:
        path = out / shard.name
        if not (path.exists() and atomic_files.is_whole(path)):
            blocks = _merge_shard(plan, shard, progress)
            atomic_files.write_file(path, lambda p, s=shard, b=blocks: tensor_files.write_shard(p, s, b), seal=True)
    if index is not None:
        atomic_files.write_text(out / "model.safetensors.index.json", json.dumps(index, indent=1))
    _write_config(plan, out)
    _write_tokenizer(plan, out)
    copy_companions(plan.like.model.folder, out)


def _pairs(plan: MergePlan) -> Iterable[tuple[TensorFolder, Any]]:
    return zip(plan.folders, plan.options.inputs, strict=True)


def _describe_models(options: MergeOptions) -> list[dict[str, Any]]:
    return [{"parameters": m.model_dump()["parameters"], "is_base": m is options.base} for m in options.inputs]


def _fingerprint(folder: TensorFolder, model: Any) -> str:
    """Return a fingerprint of a model's files, and of its adapter's."""
    if model.adapter is None:
        return folder.model.fingerprint
    files = [Path(model.adapter) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return digest_files(files, folder.model.fingerprint)


def _build(
    plan: MergePlan,
    progress: Progress,
    shard_bytes: int,
    documents: Sequence[Document],
    vocabulary: Vocabulary | None,
    out: Path,
) -> dict[str, Any]:
    if METHODS[plan.options.method].needs_texts:
        from fuselm.runs.merging.soup import prepare_soup

        plan = prepare_soup(plan, documents, vocabulary or load_vocabulary(plan.like.model), out, progress)
    write_merged_model(plan, out, progress, shard_bytes=shard_bytes)
    card = render_template(
        "merge_card.md.jinja",
        method=plan.options.method,
        models=[
            {"name": _name_model(m), "is_base": m is plan.options.base, "parameters": m.model_dump()["parameters"]}
            for m in plan.options.inputs
        ],
        bases=sorted({name for m in plan.options.inputs if (name := _find_hub_name(m.model))}),
        parameters=plan.options.model_dump()["parameters"],
        folder=out.name.removesuffix(".partial"),
    )
    atomic_files.write_text(out / "README.md", card)
    return {"parameters": plan.parameters, "tensors": len(plan.tensors), "models": len(plan.folders)}


def _name_model(model: Any) -> str:
    name = name_publicly(model.model)
    return name if model.adapter is None else f"{name} with the adapter {name_publicly(model.adapter)}"


def _find_hub_name(name: str) -> str | None:
    return name if not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _merge_shard(plan: MergePlan, shard: Shard, progress: Progress) -> Iterator[Float[Tensor, "rows *rest"]]:
    numbers = {number for name in plan.tensors if (number := find_layer(name)) is not None}
    for name, (shape, _) in shard.tensors.items():
        layer = find_layer(name)
        place = 0.0 if layer is None else layer / max(numbers) if max(numbers) else 1.0
        is_small = torch.Size(shape).numel() * len(plan.folders) <= HELD
        blocks = _Passes(partial(read_blocks, plan, name, shape or (1,)), is_held=is_small)
        has_base = METHODS[plan.options.method].base != "unused" and plan.options.base is not None
        method, parameters = plan.options.method, plan.options.find_parameters(name, place)
        if plan.shares is not None:
            method, parameters = "linear", {"weight": list(plan.shares(name)), "normalize": True}
        merge = begin_merge(
            method,
            blocks,
            parameters=parameters,
            has_base=has_base,
            seed=plan.options.seed * 1_000_003 + sorted(plan.tensors).index(name),
            is_embedding=name in plan.embeddings,
        )
        for block in blocks.end():
            merged = merge(block)
            progress.advance(merged.numel(), name)
            yield merged


class _Passes:
    """Pass over a tensor's blocks as often as a method needs; with `is_held` the first pass keeps them in memory."""

    def __init__(self, read: Callable[[], Iterator[Models]], *, is_held: bool):
        self._read, self._is_held = read, is_held
        self._held: list[Models] | None = None

    def __call__(self) -> Iterator[Models]:
        return self._hold() if self._held is None and self._is_held else self.end()

    def end(self) -> Iterator[Models]:
        """Pass over the blocks for the last time: they are not kept."""
        return read_ahead(self._read()) if self._held is None else iter(self._held)

    def _hold(self) -> Iterator[Models]:
        held = []
        for models in read_ahead(self._read()):
            held.append(models)
            yield models
        self._held = held


def find_layer(name: str) -> int | None:
    """Return the number of a tensor's layer, the first in its name; None of a tensor outside of layers."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def read_blocks(plan: MergePlan, name: str, shape: tuple[int, ...]) -> Iterator[Models]:
    """Yield blocks of rows of a tensor, of every model."""
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    for begin in range(0, shape[0], rows):
        end = min(begin + rows, shape[0])
        if name in plan.vocabulary_tensors and not plan.vocabulary.is_shared:
            readers = [partial(folder.read, name) for folder in plan.folders]
            yield read_united_rows(readers, plan.vocabulary, begin, end)
        else:
            yield [folder.read(name, begin, end) for folder in plan.folders]


def read_tensors(plan: MergePlan, name: str) -> list[Float[Tensor, "*shape"]]:
    """Return a tensor of every model, whole."""
    shape = plan.tensors[name][0]
    read = zip(*read_blocks(plan, name, shape or (1,)), strict=True)
    return [torch.cat(blocks).reshape(shape) for blocks in read]


def _write_config(plan: MergePlan, out: Path) -> None:
    config = dict(plan.like.config)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    if plan.vocabulary_tensors:
        text["vocab_size"] = plan.vocabulary.rows
    if plan.options.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = plan.options.dtype
    atomic_files.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def _write_tokenizer(plan: MergePlan, out: Path) -> None:
    """Write the first model's tokenizer with the tokens that others add, if any."""
    if plan.vocabulary.added:
        tokenizer = load_tokenizer(plan.like.model)
        tokenizer.add_tokens(list(plan.vocabulary.added))
        atomic_files.write_file(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
