"""Line charts as inline SVG: a report in one file needs no scripts, no fonts and no pictures beside it."""

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

_COLOURS = (
    "#1f6fb4",
    "#d1495b",
    "#3a9a5b",
    "#e08e0b",
    "#7b4fa3",
    "#008c95",
    "#a05a2c",
    "#555555",
    "#c2185b",
    "#5c6bc0",
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 26, 24


def line_chart(title: str, lines: Mapping[str, Points], width: int = 380, height: int = 220) -> str:
    """SVG of the lines; those whose name begins with "train" are thin, and the legend stands below the axis."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    last = max(xs) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (width - _LEFT - _RIGHT) * x / last
        down = _TOP + (height - _TOP - _BOTTOM) * (high - y) / (high - low)
        return across, down

    parts = [f'<text x="{_LEFT}" y="16" class="title">{html.escape(title)}</text>']
    for tick in _ticks(low, high):
        _, y = place(0, tick)
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" class="tick" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(0, last):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{height - 7}" class="tick" text-anchor="middle">{tick:g}</text>')
    legend = []
    for i, (name, points) in enumerate(lines.items()):
        colour, thin = _COLOURS[i % len(_COLOURS)], 1 if name.startswith("train") else 2
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{thin}"/>')
        legend.append(f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>')
    drawn = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{drawn}<figcaption>{"".join(legend)}</figcaption></figure>'


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= about + 1)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def training_charts(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Charts of a run's metrics.jsonl: one a quantity, its parts by task in the same chart."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step":
                series.setdefault(name, []).append((line["step"], value))
    groups: dict[str, dict[str, Points]] = {}
    for name, points in series.items():
        split, _, quantity = name.partition("/")
        head, _, task = quantity.partition("/")
        # Norms and speeds are for those who look into metrics.jsonl; tasks are shown on held-out data alone.
        if f"val/{head}" in series and not (task and split == "train"):
            label = task or {"train": "training", "val": "held out"}[split]
            groups.setdefault(head.replace("_", " "), {})[label] = points
    return [line_chart(name, lines) for name, lines in groups.items()]
