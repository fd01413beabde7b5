"""Plan a run over a sample of its texts, and advise how to share its stages and where to make its rows."""

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fuselm.documents import file_samples, text_files
from fuselm.runs.estimates import Estimate
from fuselm.system.durations import format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from fuselm.runs.config import RunOptions
    from fuselm.runs.pipeline import Pipeline

GIB = 1 << 30
HOURS = 12.0  # that a stage may take before it is worth sharing
ROWS_BYTES = 20 * GIB  # of aligned and fused stores, before it is worth making their rows while training reads them


@contextlib.contextmanager
def open_sample(run: "RunOptions", megabytes: int, console: "Console") -> Iterator["Pipeline"]:
    """Open a run over about so many MB of its texts, in a temporary folder; its estimates are of all texts.

    Raises `ValueError` if the texts are a dataset.
    """
    from fuselm.runs.pipeline import Pipeline

    if run.corpus.dataset is not None:
        raise ValueError("--sample: samples files, and corpus.dataset is none; set corpus.dataset.limit instead")
    files = text_files.find_files(run.corpus.files)
    with tempfile.TemporaryDirectory() as folder:
        copies, factor = file_samples.copy_samples(files, Path(folder, "texts"), size=megabytes * 1_000_000)
        texts = run.corpus.model_copy(update={"files": list(map(str, copies))})
        places = {"output": f"{folder}/run", "store_dir": f"{folder}/stores"}
        pipeline = Pipeline(run.model_copy(update={"corpus": texts, **places}), console)
        pipeline.start()
        pipeline.sampled_factor = factor
        yield pipeline


def advise(run: "RunOptions", rows: Sequence[Estimate]) -> list[str]:
    """Return advice for a run that takes so much, a line each; none for a small one."""
    lines = []
    long = [row for row in rows if row.parts > 1 and (row.seconds or 0.0) > HOURS * 3600]
    for row in long:
        assert row.seconds is not None
        count = min(math.ceil(row.seconds / (HOURS * 3600)), row.parts)
        lines.append(
            f"{row.title}: {format_duration(row.seconds, decimals=0)} in one process; let {count} share its "
            f"{row.parts:,} parts (`processes`, --shard or Ray)"
        )
    stored = sum(row.disk if row.kept is None else row.kept for row in rows if _has_rows(row))
    if run.fuse.when == "stage" and stored > ROWS_BYTES:
        lines.append(
            f"aligned and fused rows take {stored / GIB:,.0f} GiB; fuse.when=load makes them while training reads "
            "them, and keeps a sample alone"
        )
    return lines


def _has_rows(row: Estimate) -> bool:
    return row.title.partition(" ")[0] in ("align", "fuse")
