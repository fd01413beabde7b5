"""Draw the figures of the README and of the pages that explain the method, from the stores of a run of the quickstart.

    fuselm fuse examples/full.yaml
    python benchmarks/explain.py runs/full

Writes fusion.svg, capture.svg, align.svg and weights.svg to docs/figures/front. They show one training document: how
many bits each source and the fusion need for each word, what the capture keeps of one distribution, and where tokens
begin; and the weights of the sources in every domain.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fuselm
from fuselm.system import atomic_files, manifest
from fuselm.system.foreign_text import escape_html

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "figures" / "front"
DOCUMENT, WORDS, WORD = "000092", 15, " lucratif"  # of the quickstart: a sentence about Debian in French
WIDTH = 960
SHADES = ("#e8590c", "#0b9e8a", "#3b5bdb", "#b8336a", "#806000")
INK, FAINT, BLUE, ORANGE = "#1f2430", "#6b7280", "#3b5bdb", "#e8590c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Hold a document: its text, its fused trace, and the traces of each source, as captured and as aligned."""

    text: bytes
    fused: fuselm.Trace
    captured: dict[str, fuselm.Trace]
    heads: dict[str, fuselm.Trace]  # those captured, without what was drawn from tails
    aligned: dict[str, fuselm.Trace]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that has fused its sources")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures")
    parser.add_argument("--document", default=DOCUMENT, help="id of a training document")
    parser.add_argument("--word", default=WORD, help="word of it whose distributions are shown")
    options = parser.parse_args(arguments)
    run = fuselm.load_run(options.run / "config.yaml", quiet=True)
    traced = read_document(run, options.document)
    vocabularies = {
        name: fuselm.load_vocabulary(fuselm.locate_model(s.model)) for name, s in run.options.sources.items()
    }
    target = fuselm.load_vocabulary(fuselm.locate_model(run.options.target.model))
    options.out.mkdir(parents=True, exist_ok=True)
    counts = manifest.read(run.fuse().folder)["counts"]
    figures = {
        "weights": draw_weights(counts["sources"], counts["weights"]),
        "fusion": draw_words(traced, target, options.word),
        "capture": draw_capture(traced, vocabularies, options.word),
        "align": draw_tokens(traced, options.word),
    }
    for name, figure in figures.items():
        atomic_files.write_text(options.out / f"{name}.svg", figure)
        print(options.out / f"{name}.svg")


def read_document(run: fuselm.FusionRun, document: str) -> Traced:
    """Read one document from the stores of a run, making those that are not there."""
    texts, captured, aligned, fused = run.texts(), run.capture(), run.align(), run.fuse()
    if document not in texts:
        sys.exit(f"{document}: no such training document; there are {', '.join(sorted(texts)[:3])} and others")
    return Traced(
        text=texts[document].encode(),
        fused=fused.read(document),
        captured={name: store.read(document) for name, store in captured.items()},
        heads={name: fuselm.Store(store.folder, draws=False).read(document) for name, store in captured.items()},
        aligned={name: store.read(document) for name, store in aligned.items()},
    )


def split_words(trace: fuselm.Trace, text: bytes) -> list[tuple[str, int, int]]:
    """Return the words of a text, each with its first token and the one behind its last."""
    starts = [max(0, int(start)) for start in trace.starts] + [len(text)]
    first = [0] + [i for i in range(1, len(trace.tokens)) if text[starts[i] : starts[i] + 1] in (b" ", b"\n")]
    ends = [*first[1:], len(trace.tokens)]
    return [(text[starts[a] : starts[b]].decode(errors="replace"), a, b) for a, b in zip(first, ends, strict=True)]


def draw_words(traced: Traced, vocabulary: fuselm.Vocabulary, word: str) -> str:
    """Draw the bits that each model and the fusion need for each word, and below it one distribution of each."""
    rows = {**traced.aligned, "fusion": traced.fused}
    words = split_words(traced.fused, traced.text)[:WORDS]
    left, top, height, x = 92, 66, 30, 92.0
    parts = [text(24, 28, "Bits that each model needs for each word of a document; fewer is better", bold=True)]
    widths = [max(34.0, 7.4 * len(shown.strip()) + 12) for shown, _, _ in words]
    scale = (WIDTH - left - 24) / sum(widths)
    for (shown, a, b), width in zip(words, widths, strict=True):
        width *= scale
        chosen = shown == word
        size = min(13.0, 13.0 * scale)
        parts.append(text(x + width / 2, top - 10, shown.strip(), middle=True, bold=chosen, size=size))
        for number, trace in enumerate(rows.values()):
            bits = float(-trace.distributions.gold[a:b].sum()) / math.log(2)
            y = top + number * height + 6 * (number == len(rows) - 1)
            shade = min(1.0, bits / 26)
            colour = ORANGE if number < len(rows) - 1 else BLUE
            parts.append(box(x + 1, y, width - 2, height - 3, colour, 0.06 + 0.8 * shade))
            parts.append(text(x + width / 2, y + 18, f"{bits:.1f}", middle=True, size=12))
        x += width
    for number, name in enumerate(rows):
        parts.append(
            text(left - 10, top + number * height + 18 + 6 * (name == "fusion"), name, end=True, bold=name == "fusion")
        )
    parts.append(text(24, top + 4 * height + 46, f"What each expects where “{word.strip()}” comes", bold=True))
    token = next(a for shown, a, _ in words if shown == word)
    column = (WIDTH - 48) / len(rows)
    for number, (name, trace) in enumerate(rows.items()):
        parts += draw_row(trace, token, vocabulary, 24 + number * column, top + 4 * height + 66, column - 24, name)
    return svg(parts, top + 4 * height + 178)


def draw_row(
    trace: fuselm.Trace, token: int, vocabulary: fuselm.Vocabulary, x: float, y: float, width: float, name: str
) -> list[str]:
    """Draw the four most probable tokens of one row as bars."""
    ids, logprobs, *_ = trace.distributions.row(token)
    ranked = sorted(zip(logprobs.tolist(), ids.tolist(), strict=True), reverse=True)[:4]
    parts = [text(x, y + 8, name, size=12, bold=name == "fusion")]
    for place, (logprob, i) in enumerate(ranked):
        at, probability = y + 18 + place * 22, math.exp(logprob)
        came = i == int(trace.tokens[token])
        colour = BLUE if name == "fusion" else ORANGE
        parts.append(box(x, at, max(1.0, (width - 120) * probability), 16, colour, 0.85 if came else 0.35))
        parts.append(
            text(
                x + (width - 120) * probability + 6,
                at + 13,
                f"{spell(vocabulary, i)}  {probability:.0%}",
                size=12,
                bold=came,
            )
        )
    return parts


def draw_capture(traced: Traced, vocabularies: dict[str, fuselm.Vocabulary], word: str) -> str:
    """Draw what is kept of one distribution of the second source: the head as it is, and what was drawn of the tail."""
    name = list(traced.captured)[min(1, len(traced.captured) - 1)]
    trace = traced.captured[name]
    token = find_spread_row(traced.heads[name])
    head = set(traced.heads[name].distributions.row(token)[0].tolist())
    ids, logprobs, *_ = trace.distributions.row(token)
    ranked = sorted(zip(logprobs.tolist(), ids.tolist(), strict=True), reverse=True)
    starts = [max(0, int(start)) for start in trace.starts] + [len(traced.text)]
    before = traced.text[max(0, starts[token] - 48) : starts[token]].decode(errors="ignore")
    came = int(trace.tokens[token])
    parts = [text(24, 28, f"What is kept of {name}'s distribution behind “…{before}”", bold=True)]
    for place, (logprob, i) in enumerate(ranked):
        y, probability = 48 + place * 22, math.exp(logprob)
        is_drawn = i not in head
        parts.append(text(170, y + 13, spell(vocabularies[name], i), end=True, bold=i == came))
        parts.append(
            box(180, y, max(2.0, 1400 * probability), 16, FAINT if is_drawn else ORANGE, 0.45 if is_drawn else 0.85)
        )
        note = (
            "drawn from the tail"
            if is_drawn
            else f"{probability:.3f}" + (" (the token that came)" if i == came else "")
        )
        parts.append(text(190 + 1400 * probability, y + 13, note, size=12))
    return svg(parts, 64 + len(ranked) * 22)


def find_spread_row(heads: fuselm.Trace) -> int:
    """Return the token of which about a third lies in the tail, and no entry has nearly all of the rest."""

    def distance(token: int) -> float:
        _, logprobs, *_ = heads.distributions.row(token)
        tail = float(heads.distributions.tail[token])
        return abs(tail - 1 / 3) + float(math.exp(max(logprobs)) > 0.45)

    return min(range(1, len(heads.tokens)), key=distance)


def draw_tokens(traced: Traced, word: str) -> str:
    """Draw the tokens of all models around a word, at the bytes where they begin and end."""
    rows = {name: trace for name, trace in traced.captured.items()}
    words = split_words(traced.fused, traced.text)
    place = next(i for i, (shown, _, _) in enumerate(words) if shown == word)
    starts = [max(0, int(start)) for start in traced.fused.starts] + [len(traced.text)]
    begin, end = starts[words[max(0, place - 3)][1]], starts[words[place][2]]
    scale, left, parts = (WIDTH - 140) / (end - begin), 116, []
    parts.append(text(24, 28, "The same bytes, as each model cuts them into tokens", bold=True))
    for number, (name, trace) in enumerate(rows.items()):
        y = 48 + number * 42
        edges = [max(0, int(start)) for start in trace.starts] + [len(traced.text)]
        parts.append(text(left - 12, y + 21, name, end=True))
        for a, b in itertools.pairwise(edges):
            if b <= begin or a >= end or a == b:
                continue
            x, width = left + (max(a, begin) - begin) * scale, (min(b, end) - max(a, begin)) * scale
            shown = traced.text[a:b].decode(errors="replace").replace(" ", "␣")
            parts.append(box(x + 1, y, width - 2, 30, BLUE if number == 0 else ORANGE, 0.18))
            parts.append(text(x + width / 2, y + 20, shown, middle=True, size=13))
    return svg(parts, 60 + len(rows) * 42)


def draw_weights(sources: Sequence[str], weights: Mapping[str, Sequence[float]]) -> str:
    """Draw the weights of the sources in every domain, as bars that add up to 1."""
    left, parts = (
        150,
        [text(24, 28, "Weights of the sources in each domain, learned from its training text", bold=True)],
    )
    order = sorted(range(len(sources)), key=lambda number: sources[number])
    for place, number in enumerate(order):
        parts.append(box(left + place * 130, 42, 14, 14, SHADES[place % len(SHADES)], 0.7))
        parts.append(text(left + place * 130 + 20, 54, sources[number], size=12))
    for row, (domain, given) in enumerate(weights.items()):
        x, y = float(left), 70 + row * 30
        parts.append(text(left - 12, y + 17, domain.replace("_", " "), end=True))
        for place, number in enumerate(order):
            width = (WIDTH - left - 24) * given[number] / sum(given)
            parts.append(box(x, y, max(0.0, width - 2), 24, SHADES[place % len(SHADES)], 0.7))
            if width > 34:
                parts.append(text(x + width / 2, y + 17, f"{given[number]:.2f}", middle=True, size=12))
            x += width
    return svg(parts, 82 + len(weights) * 30)


def spell(vocabulary: fuselm.Vocabulary, i: int) -> str:
    """Return a token as text, its spaces visible."""
    return (vocabulary.token_bytes[i] or b"").decode(errors="replace").replace(" ", "␣").replace("\n", "⏎") or "(none)"


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3" fill="{colour}" '
        f'fill-opacity="{opacity:.2f}"/>'
    )


def text(
    x: float, y: float, shown: str, *, size: float = 13, bold: bool = False, middle: bool = False, end: bool = False
) -> str:
    anchor = "middle" if middle else "end" if end else "start"
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{weight}>{escape_html(shown)}</text>"


def svg(parts: Sequence[str], height: float) -> str:
    """Return a figure on a white ground, so that it can be read on dark pages too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'font-family="system-ui, sans-serif" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
