"""Make stores from stores: join shards, choose documents, cut rows to a narrower policy.

Rows are copied as they are on disk, so nothing is rounded twice. The same stores give the same parts, in whatever order
they are named. docs/store.md says what is refused.
"""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.stores import retention, rounding, store
from fuselm.stores.policies import POLICIES
from fuselm.stores.retention import Policy
from fuselm.stores.rows import read_traces
from fuselm.stores.store import Store
from fuselm.system import fingerprints, manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

FREE = ("batch_tokens",)  # parameters that shards may differ in: they move no row by more than arithmetic does


def build_store_once(out: Path, recipe: Recipe, build: Callable[[Path], dict[str, Any]]) -> bool:
    """Fill the folder `out`, which the user named; return whether anything was done.

    Raises `ValueError` if `out` already holds something else, because nothing is ever overwritten.
    """
    if manifest.is_finished(out):
        if manifest.read(out)["key"] != recipe.key:
            raise ValueError(f"{out}: there already, and made of other inputs; name another folder")
        return False
    if out.exists():
        raise ValueError(f"{out}: there already, and no store; name another folder")
    return manifest.build_once(out, recipe, build)


def copy_rows(out: Path, tables: Iterable[pa.Table]) -> dict[str, int]:
    """Write rows to parts of `out`, replacing the parts of an interrupted call, then write the index."""
    for leftover in out.glob("part-*.parquet"):
        leftover.unlink()
    groups = _regroup_tables(tables)
    for number in itertools.count():
        if (first := next(groups, None)) is None:
            return store.write_index(out)
        store.write_tables(store.part_path(out, number), _take_part(itertools.chain([first], groups)))


def _regroup_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of at least one row group's tokens; the last table may be smaller."""
    held, count = [], 0
    for table in tables:
        held.append(table)
        count += count_tokens(table)
        if count >= store.GROUP_TOKENS:
            yield pa.concat_tables(held)
            held, count = [], 0
    if any(len(table) for table in held):
        yield pa.concat_tables(held)


def _take_part(groups: Iterator[pa.Table]) -> Iterator[pa.Table]:
    taken = 0
    while taken < store.PART_TOKENS and (group := next(groups, None)) is not None:
        taken += count_tokens(group)
        yield group


def count_tokens(table: pa.Table) -> int:
    return pc.sum(pc.list_value_length(table["tokens"])).as_py() or 0


# ---- merge


def merge_stores(folders: Sequence[Path], out: Path, *, progress: Progress) -> bool:
    """Join captures of different documents by one model into one store; return whether anything was done.

    A document that is in several stores is taken once. Raises `ValueError` if the stores have different models,
    tokenizers or policies, naming the difference, or if they have different rows for one document.
    """
    stores = sorted(map(Store, folders), key=lambda s: (min(s.documents, default=""), _hash_store(s)))
    recipe = make_merge_recipe(stores)

    def build(partial: Path) -> dict[str, Any]:
        progress.start(sum(map(len, stores)), unit="documents")
        elsewhere = _find_repeated_documents(stores)
        counts = copy_rows(partial, _read_without_repeated(stores, elsewhere, progress))
        skipped = {document for s in stores for document in s.manifest["counts"].get("skipped", [])}
        skipped = {document for document in skipped if not any(document in s for s in stores)}
        joined = {"stores": len(stores), "repeated": sum(map(len, elsewhere)), "skipped": sorted(skipped)}
        return {**counts, **joined, **_merge_vocabulary_sizes(stores)}

    return build_store_once(out, recipe, build)


def make_merge_recipe(stores: Sequence[Store]) -> Recipe:
    """Return the recipe of the merged store. Raises `ValueError` if the stores are not of one kind."""
    first = stores[0]
    wanted = _collect_shared_facts(first)
    for other in stores:
        if (stage := other.manifest["stage"]) != "capture":
            raise ValueError(f"{other.folder}: of stage {stage}; merge captures, and let a run align and fuse them")
        kind = _collect_shared_facts(other)
        differ = [
            f"{name} ({kind.get(name)} and {wanted.get(name)})"
            for name in sorted({*kind, *wanted})
            if kind.get(name) != wanted.get(name)
        ]
        if differ:
            raise ValueError(
                f"{other.folder}: differs from {first.folder} in {', '.join(differ)}; "
                "merge captures by one model, tokenizer and policy"
            )
    inputs = {name: first.manifest["inputs"][name] for name in ("model", "tokenizer") if name in wanted}
    corpora = {s.manifest["inputs"].get("corpus", "") for s in stores}
    inputs["corpus"] = corpora.pop() if len(corpora) == 1 else fingerprints.hash_lines(sorted(corpora))
    return Recipe(
        stage="capture",
        parameters={name: v for name, v in first.manifest["parameters"].items() if name not in FREE},
        inputs={**inputs, "stores": fingerprints.hash_lines(sorted(map(_hash_store, stores)))},
        about=first.manifest["about"],
    )


def _collect_shared_facts(of: Store) -> dict[str, Any]:
    """Return the facts that stores must share to be merged; a model without a fingerprint is known by its name."""
    made = of.manifest
    inputs = {name: made["inputs"][name] for name in ("model", "tokenizer") if name in made["inputs"]}
    if "model" not in inputs:
        inputs["name of the model"] = made["about"].get("model")
    return inputs | {name: value for name, value in made["parameters"].items() if name not in FREE}


def _hash_store(of: Store) -> str:
    return fingerprints.hash_lines(f"{name} {sha256}" for name, sha256 in sorted(of.manifest["files"].items()))


def _merge_vocabulary_sizes(stores: Sequence[Store]) -> dict[str, int]:
    """Return the number of ids in the vocabulary under its name, or an empty dict if no store says it."""
    sizes = [s.manifest["counts"]["vocabulary_size"] for s in stores if "vocabulary_size" in s.manifest["counts"]]
    return {"vocabulary_size": min(sizes)} if sizes else {}


def _find_repeated_documents(stores: Sequence[Store]) -> list[set[str]]:
    """Return, for each store, the documents that an earlier store has too. Raises `ValueError` if their rows differ."""
    counted = pc.value_counts(pa.concat_arrays([pa.array(s.documents, pa.string()) for s in stores]))
    several = {entry["values"] for entry in counted.filter(pc.greater(counted.field("counts"), 1)).to_pylist()}
    known: dict[str, tuple[str, Path]] = {}
    elsewhere: list[set[str]] = []
    for s in stores:
        elsewhere.append(set())
        for table in s.read_tables(several):
            for n, document in enumerate(table["document"].to_pylist()):
                digest = _hash_document(table.slice(n, 1))
                if document not in known:
                    known[document] = digest, s.folder
                    continue
                elsewhere[-1].add(document)
                if known[document][0] != digest:
                    raise ValueError(
                        f"document {document}: {known[document][1]} and {s.folder} have different rows of it; "
                        "drop it from one (`fuselm store subset`), or capture again, with the same batches, dtype and "
                        "documents in front"
                    )
    return elsewhere


def _hash_document(row: pa.Table) -> str:
    digest = hashlib.sha256()
    for field in store.SCHEMA:
        column = row[field.name].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).tobytes() if pa.types.is_list(field.type) else None
        values = repr(column.to_pylist()).encode() if values is None else values
        digest.update(b"%s %d " % (field.name.encode(), len(values)) + values)
    return digest.hexdigest()


def _read_without_repeated(
    stores: Sequence[Store], elsewhere: Sequence[set[str]], progress: Progress
) -> Iterator[pa.Table]:
    for s, dropped in zip(stores, elsewhere, strict=True):
        known = pa.array(sorted(dropped), pa.string())
        for table in s.read_tables():
            progress.advance(len(table))
            yield table.filter(pc.invert(pc.is_in(table["document"], known)))


# ---- subset


def write_subset(
    folder: Path,
    out: Path,
    *,
    documents: Collection[str] | None,
    policy: Mapping[str, Any] | None,
    progress: Progress,
) -> bool:
    """Write a store with some documents of another (None: all), with rows cut to `policy` (None: uncut).

    Returns whether anything was done. Raises `ValueError` for a document that isn't there, and for a policy that would
    keep entries that the store does not have.
    """
    whole = Store(folder, salvage=documents is not None)
    made = whole.manifest
    skipped = made["counts"].get("skipped", [])
    if documents is not None:
        missing = sorted(d for d in documents if d not in whole and d not in skipped)
        if missing:
            raise ValueError(f"{folder}: has no document {missing[0]} ({len(missing)} such); leave those out")
        skipped = sorted(set(skipped) & set(documents))
    parameters, inputs = made["parameters"], {**made["inputs"], "store": _hash_store(whole)}
    draws = parameters.get("draws")
    if policy is not None:
        numbers = set().union(*POLICIES.values())
        parameters = {name: v for name, v in parameters.items() if name not in numbers} | dict(policy)
    if documents is not None:
        inputs["documents"] = fingerprints.hash_lines(sorted(documents))
    recipe = Recipe(stage=made["stage"], parameters=parameters, inputs=inputs, about=made["about"])

    def rows() -> Iterator[pa.Table]:
        progress.start(len(whole) if documents is None else len(documents), unit="documents")
        for table in whole.read_tables(documents):
            progress.advance(len(table))
            yield table if policy is None else cut_rows(table, Policy(**policy), draws=draws, where=str(folder))

    kept = ("sources", "vocabulary_size")  # describe the weights and the ids
    about_rows = {name: made["counts"][name] for name in kept if name in made["counts"]}
    return build_store_once(
        out, recipe, lambda partial: {**about_rows, **copy_rows(partial, rows()), "skipped": skipped}
    )


def complete_policy(
    name: str, numbers: Mapping[str, int | float | None], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a policy's options: given `numbers` first, then the store's own `parameters`, then the defaults.

    Raises `ValueError` for an unknown policy, and for a number that only another policy has.
    """
    if name not in POLICIES:
        raise ValueError(f"--policy {name}: unknown; needs one of {', '.join(POLICIES)}")
    given = {option: value for option, value in numbers.items() if value is not None}
    for option in sorted(set(given) - set(POLICIES[name])):
        policies = " and ".join(policy for policy, taken in POLICIES.items() if option in taken)
        raise ValueError(f"--{option.replace('_', '-')}: an option of {policies}, but --policy is {name}; drop one")
    most = {"top_k": parameters["top_k"]} if "top_k" in parameters else {}
    return {"policy": name, **POLICIES[name], **most, **given}


def cut_rows(table: pa.Table, policy: Policy, *, draws: int | None = None, where: str) -> pa.Table:
    """Cut rows, as they are on disk, to what `policy` keeps, and drop the entries sampled from tails.

    The entries that stay are the same to the bit.
    """
    traces = read_traces(table, draws=False)
    lists = {name: [] for name in ("counts", "ids", "logprobs", "tail")}
    for n, trace in enumerate(traces):
        try:
            reduced = retention.narrow_rows(policy, trace.distributions, draws=draws)
        except ValueError as error:
            raise ValueError(f"{where}: document {trace.document}: {error}") from None
        counts, ids, logprobs, tail = (table[name][n].values.to_numpy(zero_copy_only=False) for name in lists)
        stays = _flag_retained(counts, ids, reduced.offsets, reduced.ids)
        rows = np.repeat(np.arange(len(counts)), counts)
        masses = np.exp(logprobs.astype(np.float64))
        dropped = np.bincount(rows[~stays], weights=masses[~stays], minlength=len(counts))
        fuller = rounding.round_tail(np.minimum(tail + dropped, 1.0).astype(np.float32))
        tail = np.where(dropped > 0, fuller, tail)
        kept = np.bincount(rows[stays], minlength=len(counts)).astype(np.int32)
        for name, values in zip(lists, (kept, ids[stays], logprobs[stays], tail.astype(np.float32)), strict=True):
            lists[name].append(values)
    for name, parts in lists.items():
        kind = store.SCHEMA.field(name).type
        offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        values = pa.array(np.concatenate(parts), kind.value_type)
        place = table.schema.get_field_index(name)
        table = table.set_column(place, store.SCHEMA.field(name), pa.ListArray.from_arrays(offsets, values, type=kind))
    return table


def _flag_retained(
    counts: Int[ndarray, "rows"], ids: Int[ndarray, "entries"], offsets: Int[ndarray, "edges"], kept: Int[ndarray, "k"]
) -> Bool[ndarray, "entries"]:
    """Flag the entries whose id is among those kept in the same row."""
    before = np.repeat(np.arange(len(counts)), counts).astype(np.int64) << 32 | ids
    after = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).astype(np.int64) << 32 | kept
    return np.isin(before, after)
