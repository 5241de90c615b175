"""Charts as SVG that follows a page's colours: its text is text, its lines are the page's ink in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 46
# Okabe and Ito's colours, which people with any colour vision tell apart; shapes differ as well.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
_SHAPES = (
    "M-5,-5H5V5H-5Z",
    "M0,-6L6,5H-6Z",
    "M0,-7L7,0L0,7L-7,0Z",
    "M0,6L6,-5H-6Z",
    "M-5.5,0a5.5,5.5 0 1,0 11,0a5.5,5.5 0 1,0 -11,0Z",
    "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "M-6,-3L-3,-6L0,-3L3,-6L6,-3L3,0L6,3L3,6L0,3L-3,6L-6,3L-3,0Z",
)


@dataclass(frozen=True)
class Point:
    """One mark: its place, the ends of its interval, and what is told of it."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Series:
    """Points of one method, joined by a line if there are several; a `level` is a band over the whole width instead."""

    label: str
    points: Sequence[Point] = field(default_factory=list)
    level: Point | None = None


def style(number: int) -> tuple[str, str]:
    """Colour and shape of the series with a number; pairs repeat after 56."""
    return COLOURS[number % len(COLOURS)], _SHAPES[number % len(_SHAPES)]


def scatter(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """An SVG of points with intervals over a logarithmic x axis; an empty text where there is nothing to draw."""
    points = [point for own in series for point in own.points]
    levels = [own.level for own in series if own.level is not None]
    if not points:
        return ""
    x_ends = _log_ends([point.x for point in points])
    y_ends = _ends([value for point in (*points, *levels) for value in (point.low, point.high)])

    def at_x(value: float) -> float:
        share = (math.log(value) - math.log(x_ends[0])) / (math.log(x_ends[1]) - math.log(x_ends[0]))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ends[0]) / (y_ends[1] - y_ends[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(x_ends, y_ends, at_x, at_y, x_label, y_label)]
    for number, own in enumerate(series):
        colour, shape = style(number)
        if own.level is not None:
            parts.append(_level(own.level, at_y))
            continue
        parts.append(_series(own, colour, shape, at_x, at_y))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _series(own: Series, colour: str, shape: str, at_x, at_y) -> str:
    ordered = sorted(own.points, key=lambda point: point.x)
    line = " ".join(f"{at_x(point.x):.1f},{at_y(point.y):.1f}" for point in ordered)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>']
    for point in ordered:
        x, low, high = at_x(point.x), at_y(point.low), at_y(point.high)
        parts.append(
            f'<g stroke="{colour}" fill="{colour}"><title>{escape(point.title)}</title>'
            f'<path d="M{x:.1f},{low:.1f}V{high:.1f}M{x - 4:.1f},{low:.1f}h8M{x - 4:.1f},{high:.1f}h8" fill="none"/>'
            f'<path d="{shape}" transform="translate({x:.1f},{at_y(point.y):.1f})"/></g>'
        )
    return "".join(parts)


def _level(point: Point, at_y) -> str:
    top, bottom, middle = at_y(point.high), at_y(point.low), at_y(point.y)
    return (
        f'<g class="level"><title>{escape(point.title)}</title>'
        f'<rect x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{max(bottom - top, 0.5):.1f}"/>'
        f'<path d="M{LEFT},{middle:.1f}H{WIDTH - RIGHT}"/></g>'
    )


def _axes(x_ends, y_ends, at_x, at_y, x_label: str, y_label: str) -> str:
    parts = []
    for value in y_ticks(*y_ends):
        y = at_y(value)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks(*x_ends):
        x = at_x(value)
        parts.append(f'<path class="axis" d="M{x:.1f},{HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(13,{middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    return "".join(parts)


def _log_ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.25, max(values) * 1.25


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def y_ticks(low: float, high: float) -> list[float]:
    """Between three and eight round numbers from `low` to `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(step * number, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def x_ticks(low: float, high: float) -> list[float]:
    """At most six multiples of powers of ten from `low` to `high`, if the powers themselves are not more."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= 6:
            return found
    return found


def histogram(values: Sequence[float], ends: tuple[float, float], bins: int = 24) -> str:
    """A small SVG of how often values fall into each of even bins between two ends."""
    counts, _ = np.histogram(np.clip(values, *ends), bins, ends)
    most = counts.max()
    bars = "".join(
        f'<rect x="{4 * number}" y="{24 - 24 * count / most:.1f}" width="3.4" height="{24 * count / most:.1f}"/>'
        for number, count in enumerate(counts)
        if count
    )
    told = f"from {min(values):g} to {max(values):g}, {len(values)} samples"
    return (
        f'<svg class="histogram" viewBox="0 0 {4 * bins} 25" role="img" aria-label="{told}"><title>{told}</title>'
        f'<path class="axis" d="M0,24.5H{4 * bins}"/>{bars}</svg>'
    )


def legend_mark(number: int) -> str:
    """The mark of a series beside its name."""
    colour, shape = style(number)
    return f'<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true"><path d="{shape}" fill="{colour}"/></svg>'
