"""Draw small plots as inline SVG, without scripts or external fonts.

Colours are CSS variables of the page (`--gain`, `--loss`, `--series-0` ...), so that a plot follows the page's light or
dark mode. Labels and descriptions are escaped here.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 760, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 12, 34
_LABEL_ROOM = 150
_MAX_BARS = 400
_LINE_GAP = 15
_BAR_SPREAD = 10
NUM_SERIES_COLOURS = 6


class Point(NamedTuple):
    """A point of a line: a value `y` at `x`, with the ends of its interval."""

    x: float
    y: float
    low: float
    high: float


def difference_plot(bars: Sequence[tuple[str, float]], *, description: str) -> Markup:
    """Draw one bar per query, whose height is the difference between two runs.

    A difference of 0 has no bar. Below the axis are the numbers of queries that are better, the same and worse.

    Args:
        bars: a label and a difference per query, the largest gain first. Of more than 400, a regular sample of 400 is
            drawn, without labels.
        description: text for screen readers.

    Returns:
        An SVG element to put into a page; so do the other plots.
    """
    wins = sum(value > 0 for _, value in bars)
    losses = sum(value < 0 for _, value in bars)
    shown = list(bars)
    if len(bars) > _MAX_BARS:
        shown = [bars[index * (len(bars) - 1) // (_MAX_BARS - 1)] for index in range(_MAX_BARS)]
    reach = nice_ceiling(max([abs(value) for _, value in shown], default=0.0) or 1.0)
    left, right = _LEFT, _WIDTH - _RIGHT
    top, bottom = _TOP, _HEIGHT - _BOTTOM
    middle, scale = (top + bottom) / 2, (bottom - top) / 2 / reach
    width = (right - left) / max(1, len(shown))
    parts = [_grid(left, right, middle - tick * scale, f"{tick:+.2g}" if tick else "0") for tick in _around(reach)]
    for index, (label, value) in enumerate(shown):
        if value:
            title = f"<title>{escape(label)}: {value:+.4f}</title>" if len(bars) <= _MAX_BARS else ""
            parts.append(
                f'<rect class="{"gain" if value > 0 else "loss"}" x="{left + index * width:.2f}" '
                f'y="{middle - max(value, 0.0) * scale:.2f}" width="{max(width * 0.92, 0.6):.2f}" '
                f'height="{max(abs(value) * scale, 0.6):.2f}">{title}</rect>'
            )
    share = (right - left) / max(1, len(bars))
    regions = ((0, wins, "better"), (wins, len(bars) - wins - losses, "same"), (len(bars) - losses, losses, "worse"))
    parts += _region_labels(
        [(left + (start + size / 2) * share, f"{size:,} {word}") for start, size, word in regions if size]
    )
    return _svg(parts, description)


def line_plot(series: Mapping[str, Sequence[float]], cutoffs: Sequence[int], *, description: str) -> Markup:
    """Draw lines over a logarithmic axis of ranks, with the name of each line at its end.

    Args:
        series: values from 0 to 1, one per cutoff, by name of the line.
        cutoffs: rising whole numbers from 1 on, at least one.
        description: text for screen readers.
    """
    left, right = _LEFT, _WIDTH - _LABEL_ROOM
    top, bottom = _TOP, _HEIGHT - _BOTTOM
    reach = nice_ceiling(max((max(values) for values in series.values()), default=0.0) or 1.0)
    span = math.log(cutoffs[-1] / cutoffs[0]) or 1.0

    def x(cutoff: int) -> float:
        return left + (right - left) * math.log(cutoff / cutoffs[0]) / span

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / reach

    parts = [_grid(left, right, y(reach * part / 4), f"{reach * part / 4:.3g}") for part in range(5)]
    parts += [_text(x(each), bottom + 16, f"{each:,}", "middle") for each in cutoffs]
    parts.append(_text((left + right) / 2, bottom + 30, "k (log scale)", "middle"))
    heights = _spread([y(values[-1]) for values in series.values()])
    for place, ((name, values), height) in enumerate(zip(series.items(), heights, strict=True)):
        colour = f"var(--series-{place % NUM_SERIES_COLOURS})"
        points = " ".join(f"{x(cutoff):.1f},{y(value):.1f}" for cutoff, value in zip(cutoffs, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for cutoff, value in zip(cutoffs, values, strict=True):
            title = f"{escape(name)}, k = {cutoff:,}: {value:.4f}"
            parts.append(
                f'<circle cx="{x(cutoff):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"><title>{title}</title></circle>'
            )
        label = name if len(name) <= 20 else name[:19] + "…"
        parts.append(
            f'<text x="{right + 10}" y="{height + 4:.1f}" style="fill:{colour}" class="name">{escape(label)}</text>'
        )
    return _svg(parts, description)


def scale_plot(series: Mapping[str, Sequence[Point]], *, axis: str, description: str) -> Markup:
    """Draw lines with error bars over a linear axis, with the name of each line at its end.

    Args:
        series: the points of each line, by name, in any order; at least one per line, and at least one line.
        axis: label of the axis.
        description: text for screen readers.
    """
    left, right, top, bottom = _LEFT + 14, _WIDTH - _LABEL_ROOM, _TOP, _HEIGHT - _BOTTOM
    points = [point for each in series.values() for point in each]
    first, last = min(point.x for point in points), max(point.x for point in points)
    floor, ceiling = min(0.0, *(point.low for point in points)), max(0.0, *(point.high for point in points))
    step = nice_ceiling((ceiling - floor) / 4 or 0.25)
    lowest = math.floor(floor / step + 1e-9)
    highest = max(math.ceil(ceiling / step - 1e-9), lowest + 1)

    def x(value: float) -> float:
        return left + (right - left) * ((value - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value / step - lowest) / (highest - lowest)

    parts = [
        _grid(left, right, y(each * step), f"{each * step:+.3g}" if each else "0")
        for each in range(lowest, highest + 1)
    ]
    parts += [_text(x(each), bottom + 16, f"{each:g}", "middle") for each in sorted({point.x for point in points})]
    parts.append(_text((left + right) / 2, bottom + 30, axis, "middle"))
    heights = _spread([y(max(line).y) for line in series.values()])
    for place, (name, line, height) in enumerate(zip(series, series.values(), heights, strict=True)):
        colour = f"var(--series-{(place + 1) % NUM_SERIES_COLOURS})"
        # draw error bars of the same x side by side
        aside = (place / max(1, len(series) - 1) - (len(series) > 1) / 2) * _BAR_SPREAD
        parts += _line_with_bars(f"{name}, {axis}", sorted(line), x, y, aside=aside, colour=colour)
        parts.append(
            f'<text x="{right + 10}" y="{height + 4:.1f}" style="fill:{colour}" class="name">{escape(name)}</text>'
        )
    return _svg(parts, description)


def _line_with_bars(
    name: str,
    line: Sequence[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
    *,
    aside: float,
    colour: str,
) -> Iterator[str]:
    """Yield the SVG of one line, with the error bar of each point and its values as a tooltip."""
    track = " ".join(f"{x(point.x) + aside:.1f},{y(point.y):.1f}" for point in line)
    yield f'<polyline points="{track}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for point in line:
        at = x(point.x) + aside
        title = f"{escape(name)} {point.x:g}: {point.y:+.4f} ({point.low:+.4f} to {point.high:+.4f})"
        yield (
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}" stroke="{colour}"/>'
            f'<circle cx="{at:.1f}" cy="{y(point.y):.1f}" r="3.5" fill="{colour}"><title>{title}</title></circle>'
        )


def nice_ceiling(value: float) -> float:
    """Round a positive value up to 1, 2, 2.5, 4, 5, 8 or 10 times a power of ten: 0.3 to 0.4."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))


def _around(reach: float) -> tuple[float, ...]:
    return (reach, reach / 2, 0.0, -reach / 2, -reach)


def _spread(heights: Sequence[float]) -> list[float]:
    """Move the heights of labels apart so that none covers another; the order of the list stays."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + _LINE_GAP)
    excess = max(0.0, max(moved, default=0.0) - (_HEIGHT - _BOTTOM))
    return [height - excess for height in moved]


def _region_labels(labels: Sequence[tuple[float, str]]) -> list[str]:
    """Draw labels below the axis, and move a label to the right if it would touch its neighbour."""
    parts, edge = [], float(_LEFT)
    room = [len(text) * 7.0 for _, text in labels]
    for index, (centre, text) in enumerate(labels):
        rest = sum(room[index:]) + 10 * (len(labels) - index - 1)
        start = min(max(centre - room[index] / 2, edge), _WIDTH - _RIGHT - rest)
        parts.append(_text(start + room[index] / 2, _HEIGHT - 12, text, "middle"))
        edge = start + room[index] + 10
    return parts


def _grid(left: float, right: float, y: float, label: str) -> str:
    line = f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
    return line + _text(left - 8, y + 4, label.replace("-", "−"), "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], description: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )
