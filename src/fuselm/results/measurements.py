"""Measure models on texts from Python: bits per byte, and what of a source survives alignment to a target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fuselm.results import bits_per_byte, fidelity_measurement
from fuselm.results.command_texts import Named
from fuselm.system import progress, terminal


def score_texts(
    model: str | Path,
    texts: Named,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    dtype: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a model on texts, in bits per byte: the fewer, the better it predicts them.

    `model` is a hub id, a folder, a GGUF file or a run's folder. `texts` names files as `fuselm evaluate --texts` does:
    a file, a folder, a pattern, or a list of these. `columns` says which fields of them are `text` and `domain`, if
    they have other names. `template` is the chat template that a model without one reads conversations in: `plain`, a
    file or a template's text. On texts that a model was trained on, it looks better than it is. Returns `domains`, with
    `bits_per_byte`, `documents` and `bytes` by domain, and the `average` over domains.

    Raises:
        ValueError: If the model or a text cannot be used; the message is one line that says what to do.

    >>> scores = fuselm.score_texts("models/target", "texts.jsonl", quiet=True)
    >>> sorted(scores["domains"])
    ['english', 'french']
    >>> 0 < scores["average"]["bits_per_byte"] < 20
    True
    """
    return bits_per_byte.measure_bits_per_byte(
        str(model), texts, dtype=dtype, console=_open_console(quiet), columns=columns, template=template
    )


def measure_fidelity(
    source: str | Path,
    target: str | Path,
    texts: Named,
    *,
    columns: Mapping[str, str] | None = None,
    methods: Sequence[str] = ("span",),
    top_k: int = 64,
    sampled_tokens: int = 8192,
    template: str | None = None,
    dtype: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure what of a source's distributions survives alignment to a target's tokens.

    Returns what `fuselm fidelity --json` prints: numbers by domain and on average, where information is lost and why,
    and a `verdict`. Of the target only the tokenizer is used. The source writes `sampled_tokens` tokens, on which the
    rows' other candidates are judged; 0 leaves that out. `template` is that of `score_texts`, or `target` for the
    target's.

    Raises:
        ValueError: If a model, a text or a method cannot be used; the message is one line that says what to do.

    >>> result = fuselm.measure_fidelity("models/other", "models/target", "texts.jsonl", sampled_tokens=0, quiet=True)
    >>> result["average"]["coverage"]
    1.0
    """
    return fidelity_measurement.measure_fidelity(
        str(source),
        str(target),
        texts,
        methods=methods,
        top_k=top_k,
        sampled_tokens=sampled_tokens,
        dtype=dtype,
        console=_open_console(quiet),
        columns=columns,
        template=template,
    )


def _open_console(quiet: bool):
    console = terminal.open_console(stderr=True, quiet=quiet)
    progress.use_console(console)
    return console
