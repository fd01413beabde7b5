"""Read the texts of a command that measures models, as documents that all the models can take."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fuselm.documents import corpus, text_files, texts
from fuselm.documents.cutting import Reader
from fuselm.models.loading import load_vocabulary
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.system import progress
from fuselm.system.terminal import make_plain_text

Named = str | Path | Sequence[str | Path]  # files, folders and patterns


def read_rows(
    named: Named, title: str, console: Console, columns: Mapping[str, str] | None = None
) -> list[texts.TextRow]:
    """Read the texts that `named` stands for: a file, a folder or a pattern, or several of these.

    `columns` says which fields of the files are the text, the domain and so on, if they have other names.
    """
    named = [named] if isinstance(named, str | Path) else list(named)
    files = text_files.find_files(named)
    shown = ", ".join(map(str, named))
    rows: list[texts.TextRow] = []
    with console.status(make_plain_text(f"{title}: reading texts")):
        domains = text_files.name_domains(files, lambda file: {r.domain for r in texts.read_texts(file, None, columns)})
        for file, domain in zip(files, domains, strict=True):
            rows += [row for row in texts.read_texts(file, domain, columns) if row.text]
    if not rows:
        raise ValueError(f"{shown}: no text in it; each line needs a 'text' that is not empty")
    if "average" in {row.domain for row in rows}:
        raise ValueError(f"{shown}: a domain is named 'average', which results use for themselves; rename it")
    return rows


def cut_documents(
    rows: list[texts.TextRow], models: Sequence[tuple[Model, Vocabulary]], title: str, console: Console
) -> list[corpus.Document]:
    """Cut the texts where a model's context demands it, and say which bytes a model cannot spell."""
    from fuselm.results import notes

    whole = (
        corpus.Document(id=f"{n:06d}", origin=f"{n:06d}", domain=row.domain, split="heldout", text=row.text)
        for n, row in enumerate(rows)
    )
    readers = [Reader(name=m.name, vocabulary=v, max_tokens=m.context_length) for m, v in models]
    with progress.show_progress(console, f"{title}: cutting texts") as shown:
        shown.start(sum(corpus.count_characters(row.text) for row in rows), unit="characters")
        documents = list(corpus.cut_to_fit(whole, readers, advance=shown.advance))
        for reader in readers:
            _, unspelled = reader.vocabulary.count_tokens_and_unspelled([d.text for d in documents])
            if any(unspelled):
                found = corpus.compute_unspelled_shares(documents, unspelled)
                shown.note(notes.describe_unspelled_text(reader.name, found, is_trained_on=False))
    return documents


def load_vocabularies(
    rows: Sequence[texts.TextRow],
    models: Sequence[Model],
    template: str | None = None,
    *,
    option: str | None = "--template",
) -> list[Vocabulary]:
    """Return each model's vocabulary, which reads conversations if any row is one.

    `template` is for models without one: a name, a file, a template's text, or `target` for that of the last model.
    `option` is what gives it, None if nothing does. Raises `ValueError` if a row is a conversation and a model has no
    chat template, or if `template` does nothing.
    """
    from fuselm.models.chat import dialogue_reading, templates

    found = [load_vocabulary(model) for model in models]
    lacking = [model.name for model in models if not templates.has_template(model)]
    if all(isinstance(row.text, str) for row in rows):
        if template is not None:
            raise ValueError(f"{option}: does nothing here, because the texts have no conversation; drop it")
        return found
    if template is not None and not lacking:
        raise ValueError(f"{option}: does nothing here, because every model has a template of its own; drop it")
    if template is None and lacking:
        remedy = f"add {option} ({', '.join(templates.NAMED)}, or a file), or " if option else ""
        raise ValueError(
            f"{lacking[0]}: has no chat template, so it reads no conversations; {remedy}take a model that was trained "
            "on conversations"
        )
    read = templates.read_template(template, models[-1], option=option or "")
    return [dialogue_reading.add_chat_template(m, v, template=read) for m, v in zip(models, found, strict=True)]
