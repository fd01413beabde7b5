"""Define the options of text: the corpus, and what sources write beside it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from fuselm.documents.choices import BAD_ROWS, NEAR_REPEATS, SPLITTING
from fuselm.runs.options.base import NotNegative, OneOf, Options
from fuselm.sources import answer_choice


def _expand_path(value: Any) -> Any:
    """Return the options that a plain string stands for."""
    return {"path": value} if isinstance(value, str) else value


def _list_one(value: Any) -> Any:
    """Return the list that a plain string stands for."""
    return [value] if isinstance(value, str) else value


Column = Literal[
    "text",
    "domain",
    "split",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
]
Answers = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class DatasetOptions(Options):
    """Name a dataset that the `datasets` library loads. A plain string in the file stands for its `path`."""

    path: str = Field(description="Load this dataset: a hub id, or a folder that `datasets` loads or has saved.")
    name: str | None = Field(None, description="Load this configuration of the dataset, such as `wikitext-2-raw-v1`.")
    revision: str | None = Field(
        None, description="Take this branch, tag or commit of a hub id; `main` if nothing is given."
    )
    split: str | None = Field(
        None,
        description="Read this split of the dataset, `train` if nothing is given. Slices such as `train[:10%]` work "
        "too, except with `streaming`. All its rows are drawn into the splits of the run.",
    )
    text: str = Field("text", description="Read the texts from this column.")
    domain: str | None = Field(
        None, description="Read the domains from this column. If nothing is given, the dataset is one domain."
    )
    streaming: bool = Field(
        False, description="Read rows as they come instead of downloading the whole dataset; for use with `limit`."
    )
    limit: int | None = Field(None, ge=1, description="Read at most this many rows, the first ones.")


class CorpusOptions(Options):
    """Say which texts the run reads, and how they are split."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["files"]}, {"required": ["dataset"]}]})

    files: Annotated[list[str], BeforeValidator(_list_one, json_schema_input_type=str | list[str])] = Field(
        [],
        description="Read these files, folders and patterns: rows with `text` or a conversation, and maybe `domain` "
        "and `split`, as JSON lines or lists, CSV, TSV, Parquet or Arrow, and folders that `datasets` saved; or plain "
        "text, one document a file. docs/texts.md has the details.",
    )
    columns: dict[Column, str] = Field(
        {},
        description="Read `text`, `domain`, `split` and the fields of conversations from fields of the files that have "
        "other names, such as `{text: body, domain: lang}` or `{prompt: question, completion: answer}`.",
    )
    dataset: Annotated[
        DatasetOptions | None, BeforeValidator(_expand_path, json_schema_input_type=str | DatasetOptions | None)
    ] = Field(
        None,
        description="Read this dataset, besides the `files` or without any. It is fetched once and kept in the cache.",
    )
    bad_rows: Annotated[str, OneOf(BAD_ROWS)] = Field(
        "refuse",
        description="Do this with rows whose conversation cannot be used, or that a model's chat template refuses.",
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
    split: Annotated[str, OneOf(SPLITTING)] = Field(
        "draw", description="Choose the documents of the development and held-out splits in this way."
    )
    near_repeats: Annotated[str, OneOf(NEAR_REPEATS)] = Field(
        "ignore",
        description="Do this with training texts of which about three quarters or more are also in a text of the "
        "development or held-out split, by MinHash over five words at a time. Needs `pip install 'fuselm[repeats]'`.",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Train on this share of each domain's training documents. A larger share contains all documents "
        "of a smaller one.",
    )

    @model_validator(mode="after")
    def _check_texts(self) -> "CorpusOptions":
        if not self.files and self.dataset is None:
            raise ValueError("corpus: no texts; give it `files`, or a `dataset`")
        if not self.files and self.columns:
            raise ValueError(
                "corpus.columns: does nothing without `files`; set corpus.dataset.text and .domain instead"
            )
        return self

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out what is not given if it once did not exist: what was made before keeps its key."""
        written = write(self)
        for name in ("bad_rows", "split", "near_repeats"):
            if getattr(self, name) == type(self).model_fields[name].default:
                written.pop(name, None)
        for name in ("columns", "dataset"):
            if not getattr(self, name):
                written.pop(name, None)
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
    min_p: float | None = Field(
        0.05,
        ge=0,
        le=1,
        description="Never write a token whose probability is below this share of the most probable token's, and "
        "change no other probability. null draws as the source's own generation settings say.",
    )
    answers: Answers | dict[str, Answers] = Field(
        0,
        description="Let sources answer each training conversation up to its last answer this many times, and train on "
        "the best answer, too. A number is for every source with a chat template of its own except servers and the "
        "target itself; `{qwen: 4}` is for one source.",
    )
    choose: str | None = Field(
        None,
        description="Choose the best of several answers so: `mixture`, the one that is the most probable per byte to "
        "all local sources, mixed equally, which is the default; `majority`, one that says what most say in short; or "
        "a Python function, FILE.py:FUNCTION, that gets an answer and the conversation's row and gives a number.",
    )

    @model_validator(mode="after")
    def _check_choice(self) -> "WriteOptions":
        """Raise `ValueError` if there is nothing to choose from, or nothing that chooses."""
        most = max([0, *self.answers.values()]) if isinstance(self.answers, dict) else self.answers
        if self.choose is not None and most < 2:
            raise ValueError("write.choose: does nothing here, because write.answers is below 2; drop it")
        if self.choose is not None:
            answer_choice.check_choice(self.choose)
        return self

    @model_serializer(mode="wrap")
    def _omit_unused(self, write: Any) -> dict[str, Any]:
        """Leave out `answers` and `choose` where unused: reports made before they existed keep their keys."""
        written = write(self)
        if not self.answers:
            written.pop("answers", None)
        if self.choose is None:
            written.pop("choose", None)
        return written
