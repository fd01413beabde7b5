"""Define the options of text: the corpus, and what sources write beside it."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer

from fuselm.runs.options.base import NotNegative, Options

Share = Annotated[float, Field(gt=0, lt=1)]


class CorpusOptions(Options):
    """Say which texts the run reads, and how they are split."""

    files: list[str] = Field(
        min_length=1,
        description="Read these files, folders and patterns: rows with `text` and maybe `domain` and `split`, as JSON "
        "lines or lists, CSV, TSV, Parquet or Arrow, and folders that `datasets` saved; or plain text, one document a "
        "file. docs/texts.md has the details.",
    )
    columns: dict[Literal["text", "domain", "split"], str] = Field(
        {},
        description="Read `text`, `domain` and `split` from fields of the files that have other names, such as "
        "`{text: body, domain: lang}`.",
    )
    max_bytes: int = Field(
        4096,
        ge=16,
        description="Cut documents that are longer than this many bytes. Documents too long for a model's context are "
        "cut as well.",
    )
    dev: Share = Field(
        0.125,
        description="Draw this share of each domain's documents into the development split, on which checkpoints are "
        "chosen. Rows with a `split` of their own are not drawn and do not count.",
    )
    heldout: Share = Field(
        0.25,
        description="Draw this share of each domain's documents into the held-out split, which only the result sees. "
        "Rows with a `split` of their own are not drawn and do not count.",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Train on this share of each domain's training documents. A larger share contains all documents "
        "of a smaller one.",
    )

    @model_serializer(mode="wrap")
    def _omit_unused_columns(self, write: Any) -> dict[str, Any]:
        """Leave out `columns` where no field is renamed: what was made before this option existed keeps its key."""
        written = write(self)
        if not self.columns:
            written.pop("columns", None)
        return written


class WriteOptions(Options):
    """Say how much text the sources write after training documents of a domain, for the target to learn from."""

    ratio: NotNegative | dict[str, NotNegative | dict[str, NotNegative]] = Field(
        0.0,
        description="Let sources write this many bytes for each byte of the training documents. A number is shared by "
        "all sources except servers and the target itself; `{gemma: 2}` is for one source, and "
        "`{gemma: {french: 4}}` for one source in one domain.",
    )
    prompt_tokens: int = Field(
        256, ge=1, description="Let a source read this many tokens of the domain's documents before it writes a text."
    )
    tokens: int = Field(200, ge=1, description="End a written text after at most this many tokens.")
    min_p: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Never write a token whose probability is below this share of the most probable token's.",
    )
