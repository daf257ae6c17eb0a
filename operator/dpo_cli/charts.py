"""Line charts as inline SVG: axes with round ticks, raw and smoothed lines, points, and the data for a hover readout.

Pure functions from numbers to text. Colours are CSS classes (`c0` … `c3`), which the page defines for its light and
dark themes. Nothing here depends on what is plotted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from dpo_api.texts import compact

Point = tuple[int, float]
"""One observation: (step, value)."""

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 28
MAX_DRAWN_POINTS = 600
"""Most points drawn per line. Longer series keep the lowest and the highest point of each bucket: no spike is lost."""
SMOOTH_FROM = 40
"""Series with fewer points than this are not smoothed."""


@dataclass(frozen=True)
class Line:
    """One series. `kind`: "line" joins the points (smoothed if many), "exact" never smooths, "dots" marks each."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    kind: Literal["line", "exact", "dots"] = "line"


@dataclass(frozen=True)
class Chart:
    """A titled chart of one or more series over the same steps.

    `low` and `high` are values that the axis must include. `reference` draws a labelled horizontal line.
    `cut_spikes` cuts off rare outliers; a note below the chart then gives their size.
    """

    title: str
    lines: Sequence[Line]
    low: float | None = None
    high: float | None = None
    reference: tuple[float, str] | None = None
    cut_spikes: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def smooth(points: Sequence[Point], ceiling: float = math.inf) -> list[Point]:
    """Return the moving average over about a twentieth of the series, with values clipped to `ceiling`.

    The window is centred and narrows towards both ends, so that the average does not lag and keeps lines straight.
    """
    half = max(2, len(points) // 40)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + min(value, ceiling))
    result: list[Point] = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        result.append((step, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def thin(points: Sequence[Point], limit: int = MAX_DRAWN_POINTS) -> list[Point]:
    """Return at most about `limit` points: the lowest and the highest of each of limit/2 buckets, and both ends."""
    if len(points) <= limit:
        return list(points)
    buckets = limit // 2
    kept: set[int] = {0, len(points) - 1}
    for bucket in range(buckets):
        start, end = bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets
        span = range(start, end)
        kept.add(min(span, key=lambda i: points[i][1]))
        kept.add(max(span, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def spike_limit(values: Sequence[float]) -> float | None:
    """Return the value above which points are rare spikes that would flatten the rest of the chart, or None."""
    if len(values) < 10:
        return None
    ranked = sorted(values)
    common = ranked[min(len(ranked) - 2, int(len(ranked) * 0.95))]
    return common * 1.25 if common > 0 and ranked[-1] > 2.5 * common else None


def _range(chart: Chart, limit: float | None) -> tuple[float, float]:
    """Return the bounds of the value axis, padded, with `low`, `high` and the reference inside."""
    values = [value for line in chart.lines for _, value in line.points if limit is None or value <= limit]
    values += [v for v in (chart.low, chart.high, limit) if v is not None]
    if chart.reference is not None:
        values.append(chart.reference[0])
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if chart.low == low else low - pad), (high if chart.high == high else high + pad)


def _path(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float], css: str) -> str:
    if len(points) == 1:
        return f'<circle class="dot {css}" cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3"/>'
    body = "L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<path class="{css}" d="M{body}"/>'


def _series(line: Line, x: Callable[[float], float], y: Callable[[float], float], limit: float | None) -> str:
    colour = f"c{line.colour}"
    if line.kind == "dots":
        drawn = thin(line.points, 200)
        marks = "".join(f'<circle class="dot {colour}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v in drawn)
        return (_path(drawn, x, y, f"line {colour}") if len(drawn) > 1 else "") + marks
    if line.kind == "exact" or len(line.points) < SMOOTH_FROM:
        return _path(thin(line.points), x, y, f"line {colour}")
    raw = _path(thin(line.points), x, y, f"raw {colour}")
    return raw + _path(thin(smooth(line.points, limit or math.inf)), x, y, f"line {colour}")


def _axes(last: int, bounds: tuple[float, float], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    parts = []
    for value in ticks(*bounds):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{compact(value)}</text>')
    parts += [
        f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(step):,}</text>'
        for step in ticks(0, last, 6)
        if float(step).is_integer()
    ]
    return "".join(parts)


def _legend(chart: Chart) -> str:
    items = []
    for number, line in enumerate(chart.lines):
        last = compact(line.points[-1][1])
        items.append(
            f'<span class="key"><i class="c{line.colour} {line.kind}"></i>{escape(line.label)} '
            f'<b data-line="{number}" data-last="{last}">{last}</b></span>'
        )
    return f'<div class="legend">{"".join(items)}<span class="at"></span></div>'


def render(chart: Chart, last_step: int) -> str:
    """Return the chart over steps 0 … `last_step` as one `<figure>`, or nothing when no series has a point."""
    lines = [line for line in chart.lines if line.points]
    if not lines:
        return ""
    chart = Chart(chart.title, lines, chart.low, chart.high, chart.reference, chart.cut_spikes)
    values = [value for line in lines for _, value in line.points]
    limit = spike_limit(values) if chart.cut_spikes else None
    low, high = _range(chart, limit)
    last = max(last_step, 1)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        held = min(max(value, low), high)
        return TOP + (high - held) / (high - low) * (HEIGHT - TOP - BOTTOM)

    reference = ""
    if chart.reference is not None:
        at = y(chart.reference[0])
        reference = (
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{at - 5:.1f}" text-anchor="end">'
            f"{escape(chart.reference[1])}</text>"
        )
    notes = _notes(lines, limit)
    hover = {
        "last": last,
        "lines": [[[step, compact(value)] for step, value in thin(line.points)] for line in lines],
    }
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{_legend(chart)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(chart))}" '
        f'data-hover="{escape(json.dumps(hover, separators=(",", ":")))}">'
        f"{_axes(last, (low, high), x, y)}{reference}"
        f"{''.join(_series(line, x, y, limit) for line in lines)}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>{notes}</figure>'
    )


def _spoken(chart: Chart) -> str:
    """Describe the chart in one sentence for screen readers."""
    described = "; ".join(
        f"{line.label} from {compact(line.points[0][1])} at step {line.points[0][0]} "
        f"to {compact(line.points[-1][1])} at step {line.points[-1][0]}"
        for line in chart.lines
    )
    return f"{chart.title}: {described}"


def _notes(lines: Sequence[Line], limit: float | None) -> str:
    notes = []
    if any(line.kind == "line" and len(line.points) >= SMOOTH_FROM for line in lines):
        notes.append("thin: each step, thick: moving average")
    if limit is not None:
        step, top = max((point for line in lines for point in line.points), key=lambda point: point[1])
        notes.append(f"spikes above {compact(limit)} are cut off; the highest is {compact(top)} at step {step:,}")
    return f'<p class="note">{escape(" · ".join(notes))}</p>' if notes else ""
