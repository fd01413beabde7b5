"""Draw figures as SVG text, by pure functions of data.

Each function takes the width that it draws for. A figure narrower than `NARROW_BELOW` is laid out for a phone: names
stand above their rows, and panels below each other. `draw_for_all_widths` draws both, and the style sheet shows one.
The tooltips are `title` elements, which the script of a page shows to a pointer and to the keyboard.

Colours are not here: a mark has a style, a class of the page's style sheet that sets `--c` for light and dark. All text
that comes from outside is escaped.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fuselm.system.foreign_text import escape_controls
from fuselm.system.foreign_text import escape_html as escape

WIDTH, NARROW_WIDTH = 1040, 328
NARROW_BELOW = 600
MOST_POINTS = 160  # of a line; more are averaged, so that a page stays small however long the training
Point = tuple[float, float]
Scale = Callable[[float], float]  # from data to pixels

_CHARACTER_WIDTH = 7.8  # pixels that a character takes at most, for margins
_MOST_LABEL_CHARACTERS, _NARROW_LABEL_CHARACTERS = 30, 15  # the rest is in the label's tooltip
_MOST_DOTS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Hold a value with its interval, if it has one."""

    label: str
    style: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Hold points in order of x. With `dots`, each has a dot if they are few; `ring` is the point to mark."""

    label: str
    style: str
    points: Sequence[Point]
    ring: Point | None = None
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """Hold a value without an interval. A `ring` replaces the dot of a value that is not one of its equals."""

    label: str
    style: str
    value: float
    ring: bool = False


def draw_for_all_widths(draw: Callable[[int], str], *, wide: int = WIDTH) -> str:
    """Return a figure drawn for screens and one for phones, of which the style sheet shows one."""
    drawn = draw(wide)
    return drawn and f'<div class="on-wide">{drawn}</div><div class="on-narrow">{draw(NARROW_WIDTH)}</div>'


def draw_intervals(
    groups: Mapping[str, Sequence[Mark]],
    *,
    label: str,
    axis: str,
    number: Callable[[float], str],
    zero: bool = False,
    width: int = WIDTH,
) -> str:
    """Draw a row for each mark, a dot with its interval, below the name of its group; `zero` adds a line at zero."""
    marks = [m for group in groups.values() for m in group]
    single = all(len(group) == 1 for group in groups.values())
    most, stacked = _count_label_characters(width), width < NARROW_BELOW and not single
    row, gap = (30.0, 0.0) if single else (19.0, 14.0)
    above = 19.0 if stacked else 0.0  # the name of a group on a line of its own
    left = 0.0 if stacked else _measure_labels(groups, most) + 14
    left += 0 if single else _measure_labels((m.label for m in marks), most) + 14
    right = width - _measure_labels(number(m.value) for m in marks) - 22
    extent = [x for m in marks for x in (m.low, m.high, m.value) if x is not None] + [0.0] * zero
    scale, ticks = _make_scale(min(extent), max(extent), left, right, count=max(2, int((right - left) / 70)))
    height = sum(len(group) * row + gap + above for group in groups.values()) + 8
    out = [_draw_grid(ticks, scale, height)]
    if zero:
        out.append(f'<line class="zero" x1="{scale(0.0):.1f}" x2="{scale(0.0):.1f}" y1="0" y2="{height:.0f}"/>')
    y = 4.0
    for name, group in groups.items():
        if y > 4 and not single:
            out.append(f'<line class="rule" x1="0" x2="{width}" y1="{y - 1:.1f}" y2="{y - 1:.1f}"/>')
        y += gap / 2
        out.append(_draw_label(name, 0.0, y + row / 2 + 4, "group", _MOST_LABEL_CHARACTERS if stacked else most))
        y += above
        for mark in group:
            middle = y + row / 2
            out.append(f'<g class="{mark.style}">')
            out.append(f"<title>{escape(f'{name}, {mark.label}: {number(mark.value)}')}, ")
            if mark.low is None or mark.high is None:
                out.append("no interval: too few documents</title>")
            else:
                out.append(f"95% interval {number(mark.low)} to {number(mark.high)}</title>")
                out.append(f'<path class="whisker" d="M{scale(mark.low):.1f} {middle:.1f}H{scale(mark.high):.1f}"/>')
            if not single:
                out.append(_draw_label(mark.label, left - 14, middle + 4, "end", most))
            out.append(f'<circle class="dot" cx="{scale(mark.value):.1f}" cy="{middle:.1f}" r="4.5"/>')
            out.append(f'<text class="number" x="{width}" y="{middle + 4:.1f}">{number(mark.value)}</text></g>')
            y += row
        y += gap / 2
    out.append(_draw_tick_labels(ticks, scale, height + 16))
    middle = width / 2 if width < NARROW_BELOW else (left + right) / 2
    out.append(f'<text class="axis" x="{middle:.1f}" y="{height + 36:.0f}">{escape(axis)}</text>')
    return _wrap_svg("".join(out), float(width), height + 42, label)


def draw_dots(
    rows: Mapping[str, Sequence[Dot]], *, label: str, axis: str, number: Callable[[float], str], width: int = WIDTH
) -> str:
    """Draw rows of dots on one scale, with their numbers in tooltips."""
    values = [dot.value for row in rows.values() for dot in row]
    if not values:
        return ""
    most = _count_label_characters(width)
    tall, left = 30.0, _measure_labels(rows, most) + 24
    count = max(2, int((width - left) / 90))
    scale, ticks = _make_scale(min(values), max(values), left, width - 14.0, count=count)
    height = len(rows) * tall
    out = [_draw_grid(ticks, scale, height)]
    for n, (name, row) in enumerate(rows.items()):
        y, ends = (n + 0.5) * tall, [scale(dot.value) for dot in row]
        out.append(_draw_label(name, 0.0, y + 4, "group", most))
        if ends:
            out.append(f'<path class="zero" d="M{min(ends):.1f} {y:.1f}H{max(ends):.1f}"/>')
        for dot, x in zip(row, ends, strict=True):
            tooltip = f"<title>{escape(f'{name}, {dot.label}: {number(dot.value)}')}</title>"
            kind = "ring" if dot.ring else "dot"
            circle = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">{tooltip}</circle>'
            out.append(f'<g class="{dot.style}">{circle}</g>')
    out.append(_draw_tick_labels(ticks, scale, height + 16))
    out.append(f'<text class="axis" x="{(left + width) / 2:.1f}" y="{height + 36:.0f}">{escape(axis)}</text>')
    return _wrap_svg("".join(out), float(width), height + 42, label)


def draw_curves(
    panels: Mapping[str, Sequence[Line]], *, label: str, columns: int = 3, axis: str = "step", width: int = WIDTH
) -> str:
    """Draw lines over a common x, in a panel for each title; return an empty text if there are no points."""
    xs = [x for lines in panels.values() for line in lines for x, _ in line.points]
    if not xs:
        return ""
    columns = 1 if width < NARROW_BELOW else min(columns, len(panels))
    gap, top, height = 30.0, 30.0, 150.0 if columns > 2 else 180.0
    span = (width - gap * (columns - 1)) / columns
    tall = top + height + 46
    out = []
    for n, (title, lines) in enumerate(panels.items()):
        ys = [y for line in lines for _, y in line.points]
        if not ys:
            continue
        out.append(f'<g transform="translate({n % columns * (span + gap):.1f} {n // columns * tall:.0f})">')
        out.append(_draw_label(title, 0.0, 14.0, "group", int(span / _CHARACTER_WIDTH)))
        down, ticks = _make_scale(min(ys), max(ys), top + height, top, count=4)
        left = _measure_labels(_format_tick(t, ticks) for t in ticks) + 10
        room = _measure_labels([f"{max(xs):,.0f}"]) + 24  # of a label
        count = min(5, max(2, int((span - left) / room)))
        whole = all(float(x).is_integer() for x in xs)  # as steps and layers are
        across, steps = _make_scale(min(xs), max(xs), left, span - 8, count=count, pad=0.0, whole=whole)
        for t in ticks:
            out.append(f'<path class="grid" d="M{left:.1f} {down(t):.1f}H{span:.1f}"/>')
            out.append(
                f'<text class="tick end" x="{left - 8:.1f}" y="{down(t) + 4:.1f}">{_format_tick(t, ticks)}</text>'
            )
        out.append(_draw_tick_labels(steps, across, top + height + 16))
        out.append(f'<text class="axis" x="{(left + span) / 2:.1f}" y="{top + height + 33:.0f}">{escape(axis)}</text>')
        for line in lines:
            out.append(f'<g class="{line.style}"><title>{escape(line.label)}</title>')
            points = thin_points(line.points)
            out.append(_draw_path(points, across, down))
            if line.dots and len(points) <= _MOST_DOTS:
                out.extend(_draw_dot(line.label, axis, p, across, down, "dot", 2.5) for p in points)
            if line.ring:
                out.append(_draw_dot(line.label, axis, line.ring, across, down, "ring", 5.0))
            out.append("</g>")
        out.append("</g>")
    return _wrap_svg("".join(out), float(width), tall * math.ceil(len(panels) / columns), label)


def draw_shares(
    rows: Mapping[str, Mapping[str, float]], styles: Mapping[str, str], *, label: str, width: int = WIDTH
) -> str:
    """Draw each row as a bar of length 1 that is stacked from its parts; the rest stays pale."""
    most = _count_label_characters(width)
    row, left = 34.0, _measure_labels(rows, most) + 14
    span = width - left
    out = []
    for n, (name, parts) in enumerate(rows.items()):
        y, x = n * row + 4, left
        out.append(_draw_label(name, 0.0, y + 17, "group", most))
        out.append(f'<rect class="rest" x="{left:.1f}" y="{y}" width="{span:.1f}" height="24" rx="3"/>')
        for part, style in styles.items():
            share = parts.get(part, 0.0)
            if share <= 0:
                continue
            out.append(f'<g class="{style}"><title>{escape(f"{name}, {part}: {share:.1%} of tokens")}</title>')
            length = max(share * span - 1.5, 0.5)  # a gap between parts
            out.append(f'<rect class="bar" x="{x:.1f}" y="{y}" width="{length:.1f}" height="24" rx="3"/>')
            if share * span > 40:
                out.append(f'<text class="inside" x="{x + share * span / 2:.1f}" y="{y + 16.5}">{share:.0%}</text>')
            out.append("</g>")
            x += share * span
    return _wrap_svg("".join(out), float(width), len(rows) * row + 4, label)


def draw_bars(rows: Mapping[str, float], *, label: str, number: Callable[[float], str], width: int = WIDTH) -> str:
    """Draw each row as a bar that begins at 0, followed by its number."""
    most = _count_label_characters(width)
    row, left = 24.0, _measure_labels(rows, most) + 14
    span = width - left - _measure_labels(number(v) for v in rows.values()) - 12
    longest = max(rows.values(), default=0.0) or 1.0
    out = []
    for n, (name, value) in enumerate(rows.items()):
        y, end = n * row, left + max(value / longest * span, 1.5)
        out.append(_draw_label(name, 0.0, y + 16, "", most))
        out.append(f'<rect class="time" x="{left:.1f}" y="{y + 5}" width="{end - left:.1f}" height="14" rx="3"/>')
        out.append(f'<text class="tick" x="{end + 8:.1f}" y="{y + 16}">{escape(number(value))}</text>')
    return _wrap_svg("".join(out), float(width), len(rows) * row + 2, label)


def make_standalone(svg: str, css: str, legend: Mapping[str, str]) -> str:
    """Turn a figure into a file of its own, with its styles, and with a legend of styles by name above it."""
    opening = re.match(r'<svg viewBox="0 0 (\d+) (\d+)" role="img" aria-label="([^"]*)">', svg)
    assert opening is not None
    width, height = map(int, opening.groups()[:2])
    x, y, keys = 0.0, 14.0, []
    for name, style in legend.items():
        wide = _measure_labels([name]) + 34
        if x + wide > width and x > 0:
            x, y = 0.0, y + 22
        keys.append(f'<g class="{style}"><circle class="dot" cx="{x + 5:.1f}" cy="{y - 4:.1f}" r="4.5"/>')
        keys.append(f"{_draw_label(name, x + 16, y, 'key')}</g>")
        x += wide
    above = y + 16 if legend else 0.0
    content = svg[opening.end() : -len("</svg>")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {width + 16} {height + above + 16:.0f}" role="img" '
        f'aria-label="{opening[3]}">'
        f"<style>{css} svg {{ font-family: system-ui, sans-serif; background: var(--card); }}</style>"
        f'{"".join(keys)}<g transform="translate(0 {above:.0f})">{content}</g></svg>\n'
    )


def thin_points(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points, which are means of runs of equal length."""
    run = max(1, math.ceil(len(points) / most))
    runs = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def smooth_points(points: Sequence[Point], share: float = 0.12) -> list[Point]:
    """Return centred moving means over `share` of the points, and over fewer at both ends."""
    reach = int(len(points) * share / 2)
    out = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        near = [y for _, y in points[i - side : i + side + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def _make_scale(
    low: float, high: float, begin: float, end: float, *, count: int, pad: float = 0.04, whole: bool = False
) -> tuple[Scale, list[float]]:
    """Return the scale from data to pixels, and round ticks within the extent of the data, `whole` ones if asked."""
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    margin = (high - low) * pad
    low, high = low - margin, high + margin
    wanted = (high - low) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / wanted)))
    step = max(step, 1.0) if whole else step
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda x: begin + (x - low) / (high - low) * (end - begin), ticks


def _draw_grid(ticks: Sequence[float], scale: Scale, height: float) -> str:
    return "".join(f'<path class="grid" d="M{scale(t):.1f} 0V{height:.0f}"/>' for t in ticks)


def _draw_tick_labels(ticks: Sequence[float], scale: Scale, y: float) -> str:
    return "".join(
        f'<text class="tick middle" x="{scale(t):.1f}" y="{y:.0f}">{_format_tick(t, ticks)}</text>' for t in ticks
    )


def _format_tick(value: float, ticks: Sequence[float]) -> str:
    """Format a tick with as many decimals as the ticks need to differ."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−")


def _draw_path(points: Sequence[Point], across: Scale, down: Scale) -> str:
    return f'<path class="line" d="M{"L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)}"/>'


def _draw_dot(label: str, axis: str, point: Point, across: Scale, down: Scale, style: str, radius: float) -> str:
    x, y = point
    tooltip = f"<title>{escape(f'{label}, {axis} {x:g}: {y:.4f}')}</title>"
    return f'<circle class="{style}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="{radius}">{tooltip}</circle>'


def _draw_label(text: str, x: float, y: float, style: str, most: int = _MOST_LABEL_CHARACTERS) -> str:
    text = escape_controls(text)
    shown = text if len(text) <= most else text[: most - 1] + "…"
    tooltip = f"<title>{escape(text)}</title>" if shown != text else ""
    return f'<text class="label {style}" x="{x:.1f}" y="{y:.1f}">{escape(shown)}{tooltip}</text>'


def _count_label_characters(width: int) -> int:
    return _NARROW_LABEL_CHARACTERS if width < NARROW_BELOW else _MOST_LABEL_CHARACTERS


def _measure_labels(labels: Iterable[str], most: int = _MOST_LABEL_CHARACTERS) -> float:
    return max((min(len(label), most) for label in labels), default=0) * _CHARACTER_WIDTH


def _wrap_svg(content: str, width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{content}</svg>'
