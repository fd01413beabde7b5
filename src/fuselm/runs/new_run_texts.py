"""Make someone's files of texts ready for a new run file: enough documents a domain, and enough of them held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuselm.documents import corpus, regrouping, text_files
from fuselm.runs import input_notes
from fuselm.runs.options.texts import CorpusOptions

LARGE = 200  # documents of a domain of which no larger share is held out for the sake of others


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTexts:
    """Hold what the run file says of texts: `names` of files, their `columns`, the share that is held out.

    `copied` names the domains whose texts were copied to `rows_file`; `notes` are for the user.
    """

    names: list[str]
    columns: Mapping[str, str]
    heldout: float | None
    rows_file: Path | None
    rows: str
    copied: list[str]
    notes: list[str]


def prepare_texts(given: Sequence[str], columns: Mapping[str, str], rows_file: Path) -> PreparedTexts:
    """Regroup texts where that is needed, and hold out as many documents as an interval needs.

    `given` are files, folders and patterns. Raises `ValueError` if one cannot be used.
    """
    try:
        regrouped = regrouping.regroup_texts(given, columns)
    except ValueError as error:
        raise ValueError(str(error).replace("corpus.columns.text=", "--column text=")) from None
    unread = text_files.describe_unread_files(given)
    notes = [unread] if unread is not None else []
    if regrouped is not None:
        notes.append(
            f"too few documents in {', '.join(regrouped.domains)}: these texts were copied to {rows_file}, cut into "
            "pieces if they are long, and later changes to their files do not count"
        )
    counts = _count_documents(given, columns, regrouped)
    heldout = _choose_heldout(counts)
    default = CorpusOptions.model_fields
    share = default["heldout"].default if heldout is None else heldout
    if few := input_notes.describe_few_heldout(counts, dev=default["dev"].default, heldout=share):
        notes.append(few)
    return PreparedTexts(
        names=list(given) if regrouped is None else [*regrouped.names, str(rows_file)],
        columns=columns if regrouped is None else {},
        heldout=heldout,
        rows_file=None if regrouped is None else rows_file,
        rows="" if regrouped is None else regrouping.write_rows(regrouped.rows),
        copied=[] if regrouped is None else regrouped.domains,
        notes=notes,
    )


def _count_documents(
    given: Sequence[str], columns: Mapping[str, str], regrouped: regrouping.Regrouped | None
) -> dict[str, dict[str, int]]:
    """Count the documents of the run's domains by the split that their rows name."""
    if regrouped is None:
        return corpus.count_domains(regrouping.read_rows(given, columns))
    rows = regrouping.read_rows(regrouped.names) if regrouped.names else []
    return corpus.count_domains([*rows, *regrouped.rows])


def _choose_heldout(counts: Mapping[str, Mapping[str, int]]) -> float | None:
    """Return a larger share to hold out than the default, if intervals of small domains need it.

    It is None where a large domain would lose much text to train on, and domains that no share helps do not count.
    """
    default = CorpusOptions.model_fields
    enough = {d: said for d, said in counts.items() if said.get(corpus.UNASSIGNED, 0) >= regrouping.ENOUGH}
    if not enough or max(said[corpus.UNASSIGNED] for said in enough.values()) > LARGE:
        return None
    share = input_notes.suggest_heldout(enough, dev=default["dev"].default)
    return share if share is not None and share > default["heldout"].default else None
