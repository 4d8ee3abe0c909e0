"""Charts as SVG, drawn by hand: lines over time, and bars. Text is escaped; colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 34
COLOURS = 6  # classes c0 to c5
TICKS = 5
Points = Sequence[tuple[float, float | None]]


def lines(title: str, across: str, series: Mapping[str, Points], logarithmic: bool = False) -> str:
    """One line for each of `series`, in its colour; a point without a value breaks it. across: what the x axis is."""
    points = [(x, y) for each in series.values() for x, y in each if y is not None]
    if not points:
        return _figure(title, "<p>no data</p>")
    right = max(x for x, _ in points) or 1.0
    scale = _Scale([y for _, y in points], logarithmic)
    parts = [_grid(scale), _foot(0, right, across)]
    for number, each in enumerate(series.values()):
        path = _path(each, right, scale)
        parts.append(f'<path class="line c{number % COLOURS}" d="{path}"/>')
    return _figure(title, _svg(parts, title))


def bars(title: str, across: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """Bars beside each other: for each name of `across` one of each series."""
    values = [value for each in series.values() for value in each]
    if not any(values):
        return _figure(title, "<p>no data</p>")
    scale = _Scale([0.0, *values], False)
    slot = (WIDTH - LEFT - RIGHT) / len(across)
    width = slot * 0.8 / len(series)
    parts = [_grid(scale)]
    for number, each in enumerate(series.values()):
        for place, value in enumerate(each):
            x, y = LEFT + slot * place + slot * 0.1 + width * number, scale.y(value)
            parts.append(f'<rect class="c{number % COLOURS}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                         f'height="{HEIGHT - BOTTOM - y:.1f}"/>')
    step = math.ceil(len(across) / 10)
    parts += [_text(LEFT + slot * (place + 0.5), HEIGHT - BOTTOM + 14, name, "middle")
              for place, name in enumerate(across) if place % step == 0]
    return _figure(title, _svg(parts, title))


def legend(names: Sequence[str]) -> str:
    return '<p class="legend">' + " ".join(f'<span><i class="c{number % COLOURS}"></i>{escape(name)}</span>'
                                           for number, name in enumerate(names)) + "</p>"


class _Scale:
    """Values on the y axis."""

    def __init__(self, values: Sequence[float], logarithmic: bool) -> None:
        self.logarithmic = logarithmic
        if logarithmic:
            self.low = float(math.floor(math.log10(max(min(values), 0.01))))
            self.high = max(float(math.ceil(math.log10(max(max(values), 0.01)))), self.low + 1)
            self.ticks = [10.0**power for power in range(int(self.low), int(self.high) + 1)]
        else:
            step = _round_up(max(max(values), 1e-9) / TICKS)
            self.low, self.high = 0.0, step * TICKS
            self.ticks = [step * count for count in range(TICKS + 1)]

    def y(self, value: float) -> float:
        at = math.log10(max(value, 0.01)) if self.logarithmic else value
        part = (at - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - max(0.0, min(1.0, part)) * (HEIGHT - TOP - BOTTOM)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= value * 0.999)


def _path(points: Points, right: float, scale: _Scale) -> str:
    found, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        found.append(f"{pen}{LEFT + x / right * (WIDTH - LEFT - RIGHT):.1f} {scale.y(y):.1f}")
        pen = "L"
    return "".join(found)


def _grid(scale: _Scale) -> str:
    return "".join(f'<path class="grid" d="M{LEFT} {scale.y(tick):.1f}H{WIDTH - RIGHT}"/>'
                   + _text(LEFT - 6, scale.y(tick) + 4, short(tick), "end") for tick in scale.ticks)


def _foot(low: float, high: float, across: str) -> str:
    return "".join((_text(LEFT, HEIGHT - BOTTOM + 14, short(low), "start"),
                    _text(WIDTH - RIGHT, HEIGHT - BOTTOM + 14, short(high), "end"),
                    _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 14, across, "middle")))


def short(value: float) -> str:
    """A number as an axis has it: 1200000 is 1.2M."""
    for least, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= least:
            return f"{value / least:.3g}{letter}"
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"
