"""A picture of a load as SVG: how long requests took, and what went on from second to second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from elinvar.cli.bench.latency import Record

_WIDTH, _HEIGHT, _LEFT, _TOP = 420, 240, 56, 40
_COLOURS = {"TTFT": "#2a7de1", "ITL": "#d9822b", "E2E": "#3d9a50"}
Point = tuple[float, float]


def svg(title: str, records: Sequence[Record]) -> str:
    """Of the requests that were answered: shares by latency (on a logarithmic axis), then output
    tokens a second and requests under way over time, as shares of their greatest."""
    done = [one for one in records if one.done]
    times = {
        "TTFT": [1e3 * one.ttft for one in done],
        "ITL": [1e3 * gap for one in done for gap in one.gaps],
        "E2E": [1e3 * one.e2e for one in done],
    }
    shares = {name: _shares(values) for name, values in times.items() if values}
    width, height = 2 * (_WIDTH + _LEFT) + 60, _HEIGHT + _TOP + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_LEFT}" y="16" font-size="13">{escape(title)}</text>',
        _chart(0, "share of requests, by ms", shares, _COLOURS, log=True),
    ]
    over_time = _over_time(done)
    colours = dict(zip(over_time, ("#2a7de1", "#d9822b"), strict=False))
    parts.append(_chart(_WIDTH + _LEFT + 20, "over time, s", over_time, colours, log=False))
    return "\n".join([*parts, "</svg>", ""])


def _shares(values: Sequence[float]) -> list[Point]:
    """At most 400 points of the distribution of `values`."""
    ordered = sorted(values)
    count = len(ordered)
    picked = sorted({round(i * (count - 1) / 399) for i in range(400)})
    return [(max(1e-3, ordered[i]), (i + 1) / count) for i in picked]


def _over_time(done: Sequence[Record]) -> dict[str, list[Point]]:
    if not done:
        return {}
    start, end = min(one.due for one in done), max(one.times[-1] for one in done)
    width = max((end - start) / 60, 1e-3)
    tokens, under_way = [0.0] * 61, [0.0] * 61
    for one in done:
        each = one.tokens / len(one.times)
        for at in one.times:
            tokens[int((at - start) / width)] += each / width
        for i in range(int((one.due - start) / width), int((one.times[-1] - start) / width) + 1):
            under_way[i] += 1
    found = {"output tokens/s": tokens[:60], "requests under way": under_way[:60]}
    return {
        f"{name}, at most {_shown(max(column))}": [
            (i * width, value / max(column)) for i, value in enumerate(column)
        ]
        for name, column in found.items()
    }


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _chart(
    x: int,
    caption: str,
    lines: dict[str, list[Point]],
    colours: dict[str, str],
    log: bool,
) -> str:
    points = [point for line in lines.values() for point in line]
    if not points:
        return f'<text x="{x + _LEFT}" y="{_TOP + 20}">nothing was answered</text>'
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    scale: Callable[[float], float] = math.log10 if log else float
    span = (scale(high) - scale(low)) or 1.0

    def place(point: Point) -> str:
        across = x + _LEFT + _WIDTH * (scale(point[0]) - scale(low)) / span
        return f"{across:.1f},{_TOP + _HEIGHT * (1 - point[1]):.1f}"

    base = _TOP + _HEIGHT
    parts = [
        f'<rect x="{x + _LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        'stroke="#bbb"/>',
        f'<text x="{x + _LEFT + _WIDTH / 2}" y="{base + 34}" text-anchor="middle">{caption}</text>',
    ]
    for i in range(5):
        at, value = scale(low) + span * i / 4, i / 4
        shown = _shown(10**at if log else at)
        across, up = x + _LEFT + _WIDTH * i / 4, base - _HEIGHT * i / 4
        parts.append(f'<text x="{across}" y="{base + 16}" text-anchor="middle">{shown}</text>')
        parts.append(f'<text x="{x + _LEFT - 6}" y="{up + 4}" text-anchor="end">{value:g}</text>')
        parts.append(f'<path d="M{x + _LEFT} {up}h{_WIDTH}" stroke="#eee"/>')
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(map(place, line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}"/>')
        at_x = x + _LEFT + _WIDTH * i / len(lines)
        parts.append(f'<text x="{at_x}" y="{_TOP - 8}" fill="{colours[name]}">{name}</text>')
    return "\n".join(parts)
