"""Define `fuselm store`: inspect, check, cut, merge, convert and share stores."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fuselm.sources.choices import LAYOUTS
from fuselm.stores.policies import CUTS
from fuselm.system.remote_paths import open_path
from fuselm.system.streams import print_line

if TYPE_CHECKING:
    from fuselm.documents.corpus import Document
    from fuselm.system.progress import Progress

app = typer.Typer(
    help="Inspect, check, merge, cut, convert and share stores.", no_args_is_help=True, rich_markup_mode=None
)

Folder = Annotated[
    Path, typer.Argument(help="The folder of a store; also s3://bucket/store.", show_default=False, parser=open_path)
]
Out = Annotated[
    Path, typer.Argument(help="What to make; nothing is overwritten.", show_default=False, parser=open_path)
]
Repo = Annotated[str, typer.Option(help="Repository on the Hub, owner/name; made if it is not there.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Documents = Annotated[
    Path | None,
    typer.Option(
        help="A run's documents.jsonl, or the ids of documents, one a line.",
        show_default=False,
        parser=open_path,
        metavar="PATH",
    ),
]


@app.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Print the model, tokenizer, policy, counts, and bytes per token by column."""
    from fuselm.stores import contents
    from fuselm.system import terminal

    facts = contents.read_facts(folder)
    if as_json:
        print_line(json.dumps(facts))
    else:
        terminal.open_console().print(contents.make_facts_table(facts))


@app.command()
def verify(
    folder: Folder,
    as_json: AsJson = False,
    good: Annotated[
        Path | None, typer.Option(help="File for the ids of the documents that can be kept, for `subset --documents`.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, hub id or GGUF file of the model, to check ids by its vocabulary.")
    ] = None,
) -> None:
    """Check that a store is whole: checksums, pages, rows, index. If not: exit code 1, and a line for each problem."""
    from fuselm.stores import contents, verification
    from fuselm.system import atomic_files, manifest

    found = contents.find_tokenizer(folder, manifest.read(folder), tokenizer)
    with _show_progress("verify") as progress:
        size = None if found is None else found.output_size
        verdict = verification.verify_store(folder, progress=progress, vocabulary_size=size)
    if good is not None:
        atomic_files.write_text(good, "".join(f"{document}\n" for document in verdict.kept))
    if as_json:
        problems = [{"path": str(p.path), "what": p.what, "lost": list(p.lost)} for p in verdict.problems]
        print_line(json.dumps({"problems": problems, "kept": list(verdict.kept), "lost": list(verdict.lost)}))
    else:
        for problem in verdict.problems:
            print_line(problem)
        total = f"{len(verdict.kept)} of {len(verdict.kept) + len(verdict.lost)} documents can be kept"
        print_line(f"{folder}: {f'whole, {len(verdict.kept)} documents' if not verdict.problems else total}")
    if verdict.problems:
        raise typer.Exit(1)


@app.command()
def head(
    folder: Folder,
    documents: Annotated[int, typer.Option(min=1, help="How many documents.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 20,
    top: Annotated[int, typer.Option(min=1, help="Entries of each token.")] = 5,
    tokenizer: Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file, to show text by.")] = None,
) -> None:
    """Print the first rows as text."""
    from fuselm.stores import contents
    from fuselm.system import terminal

    console = terminal.open_console()
    for line in contents.show_documents(folder, documents=documents, rows=rows, top=top, tokenizer=tokenizer):
        console.print(line, soft_wrap=not console.is_terminal)


@app.command()
def merge(
    out: Out,
    stores: Annotated[
        list[Path], typer.Argument(help="Stores of different documents.", show_default=False, parser=open_path)
    ],
) -> None:
    """Merge the shards of several machines into one store."""
    from fuselm.stores import merging

    with _show_progress("merge") as progress:
        done = merging.merge_stores(stores, out, progress=progress)
    _print_counts(out, done)


@app.command()
def subset(
    out: Out,
    folder: Folder,
    documents: Documents = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Take only these domains of --documents; may be repeated.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help=f"{', '.join(CUTS)}: which entries are kept.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Most entries of a token.")] = None,
    mass: Annotated[
        float | None, typer.Option(min=0, max=1, help="nucleus: the probability that the kept entries reach.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="threshold: the least probability of a kept entry.")
    ] = None,
) -> None:
    """Copy some documents of a store, or fewer entries of each token, or both."""
    from fuselm.stores import merging
    from fuselm.system import manifest

    numbers = {"top_k": top_k, "mass": mass, "threshold": threshold}
    if policy is None and (given := [name for name, value in numbers.items() if value is not None]):
        raise ValueError(f"--{given[0].replace('_', '-')}: does nothing without --policy; add it")
    if domain and documents is None:
        raise ValueError("--domain: a store has no domains; name the run's documents.jsonl with --documents")
    if policy is None and documents is None:
        raise ValueError("subset: nothing to cut; give --documents, --policy or both")
    chosen = None if documents is None else _read_ids(documents, domain or [], folder)
    cut = None if policy is None else merging.complete_policy(policy, numbers, manifest.read(folder)["parameters"])
    with _show_progress("subset") as progress:
        done = merging.write_subset(folder, out, documents=chosen, policy=cut, progress=progress)
    _print_counts(out, done)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Others' file or folder; or, with --to, a store.", show_default=False, parser=open_path),
    ],
    out: Out,
    layout: Annotated[str | None, typer.Option("--from", help=f"{', '.join(LAYOUTS)}.")] = None,
    to: Annotated[str | None, typer.Option(help=f"{', '.join(LAYOUTS)}.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder, hub id or GGUF file of the ids' tokenizer.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model that made the rows. Runs check its fingerprint if it is a folder or GGUF file."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="own: row i is the distribution of token i; next: of token i + 1.")
    ] = None,
    tail: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The probability that was cut off rows before they were renormalised."),
    ] = None,
    renormalise: Annotated[bool, typer.Option(help="With --to: let each row's entries sum to 1.")] = False,
    compression: Annotated[Path | None, typer.Option(help="DistillKit's compression_config.yaml.")] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            help="A run's documents.jsonl: ids by text, or with --to, texts by id.", parser=open_path, metavar="PATH"
        ),
    ] = None,
) -> None:
    """Convert others' files to a store (--from), or a store to files for others (--to)."""
    from fuselm.sources.interchange import foreign

    if (layout is None) == (to is None):
        raise ValueError("convert: needs either --from LAYOUT or --to LAYOUT")
    if (layout or to) not in foreign.LAYOUTS:
        raise ValueError(
            f"--{'to' if to else 'from'} {layout or to}: unknown; needs one of {', '.join(foreign.LAYOUTS)}"
        )
    if rows not in (None, "own", "next"):
        raise ValueError(f"--rows {rows}: needs own or next")
    ahead = None if rows is None else rows == "next"
    texts = None if documents is None else _read_documents(documents)
    if to is not None:
        for option, value in {"model": model, "tail": tail, "compression": compression}.items():
            if value is not None:
                raise ValueError(f"--{option}: an option of --from; drop it")
        _export(source, out, to, ahead, renormalise, tokenizer, texts)
        return
    if renormalise:
        raise ValueError("--renormalise: an option of --to; drop it")
    _import(source, out, str(layout), ahead, tail, tokenizer, model, compression, texts)


@app.command()
def push(folder: Folder, repo: Repo, private: Private = False) -> None:
    """Check a store and send it, with a card, to a dataset of the Hugging Face Hub."""
    from fuselm.stores import hub_transfer

    with _show_progress("push") as progress:
        print_line(hub_transfer.push_store(folder, repo, private=private, progress=progress))


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Dataset on the Hub: owner/name.", show_default=False)],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch if left out.")] = None,
) -> None:
    """Fetch a store from a dataset of the Hugging Face Hub, and check all of it."""
    from fuselm.stores import hub_transfer

    with _show_progress("pull") as progress:
        hub_transfer.pull_store(repo, out, revision=revision, progress=progress)
    _print_counts(out, True)


def _export(
    folder: Path,
    out: Path,
    layout: str,
    ahead: bool | None,
    renormalise: bool,
    tokenizer: str | None,
    texts: "list[Document] | None",
) -> None:
    from fuselm.sources.interchange import exporting, foreign
    from fuselm.stores import contents
    from fuselm.stores.store import Store

    given = Store(folder)
    found = contents.find_tokenizer(folder, given.manifest, tokenizer)
    if found is None:
        raise ValueError(f"{folder}: its tokenizer is not here; name it with --tokenizer")
    with _show_progress(f"convert to {layout}") as progress:
        count = exporting.export_store(
            folder,
            out,
            layout=layout,
            ahead=ahead,
            renormalise=renormalise,
            tokenizer=found,
            documents=texts,
            progress=progress,
        )
    loses = foreign.LAYOUTS[layout].loses
    if given.manifest["parameters"].get("policy") == "sampled":
        loses += "; which entries were drawn: each has its share of the tail"
    print_line(f"{out}: {count} documents; lost to this layout: {loses}")


def _import(
    source: Path,
    out: Path,
    layout: str,
    ahead: bool | None,
    tail: float | None,
    tokenizer: str | None,
    model: str | None,
    compression: Path | None,
    texts: "list[Document] | None",
) -> None:
    from fuselm.models.locating import locate_model, locate_tokenizer
    from fuselm.sources.interchange import importing
    from fuselm.system import manifest

    here = locate_model(model) if model is not None and open_path(model).exists() else None
    if tokenizer is None and here is None:
        raise ValueError("convert: the tokenizer is unknown; name its folder, hub id or GGUF file with --tokenizer")
    made_by = None if model is None else (model, None if here is None else here.fingerprint)
    with _show_progress(f"convert from {layout}") as progress:
        done = importing.import_files(
            source,
            out,
            reading=importing.ImportOptions(layout=layout, ahead=ahead, tail=tail),
            tokenizer=here if tokenizer is None and here is not None else locate_tokenizer(str(tokenizer)),
            model=made_by,
            compression=importing.read_compression(compression, source),
            documents=texts,
            progress=progress,
        )
    _print_counts(out, done)
    counts = manifest.read(out)["counts"]
    for name, meaning in importing.DERIVED.items():
        if counts.get(name):
            print_line(f"  {counts[name]} {meaning}")
    if here is None:
        print_line(
            "  the model that made it is unknown: a run cannot check that it was `sources.NAME.model`; "
            "name its folder with --model to have that checked"
        )


def _print_counts(out: Path, done: bool) -> None:
    from fuselm.system import manifest

    counts = manifest.read(out)["counts"]
    print_line(
        f"{out}: {counts['documents']} documents, {counts['tokens']} tokens{'' if done else ' (was there already)'}"
    )


def _read_documents(path: Path) -> "list[Document]":
    """Read a run's documents.jsonl. Raises `ValueError` if it is something else."""
    from fuselm.documents.corpus import Document
    from fuselm.documents.text_files import check_file

    check_file(path)
    try:
        with path.open(encoding="utf-8") as file:  # whose lines end at line feeds alone, unlike those of splitlines
            return [Document(**json.loads(line)) for line in file]
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a run's documents.jsonl (corpus/<key>/documents.jsonl)") from None


def _read_ids(path: Path, domains: list[str], folder: Path) -> set[str]:
    """Return the ids that a file names. Of a run's file, which has all splits, return those that the store has."""
    from fuselm.documents.text_files import check_file
    from fuselm.stores.store import Store

    check_file(path)
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; needs a document's id a line, or a run's documents.jsonl") from None
    if not all(line.startswith("{") for line in lines):
        if domains:
            raise ValueError(f"--domain: {path} has ids only; --documents names the run's documents.jsonl")
        return {line.strip() for line in lines}
    found, documents = Store(folder), _read_documents(path)
    if unknown := sorted(set(domains) - {d.domain for d in documents}):
        known = ", ".join(sorted({d.domain for d in documents}))
        raise ValueError(f"--domain {unknown[0]}: {path} has none such; it has {known}")
    return {d.id for d in documents if d.id in found and (not domains or d.domain in domains)}


@contextmanager
def _show_progress(title: str) -> "Iterator[Progress]":
    from fuselm.system import progress, terminal

    with progress.show_progress(terminal.open_console(stderr=True), title) as shown:
        yield shown
