"""A bar chart as SVG text: a panel for each row, a bar for each side, numbers beside the bars."""

from __future__ import annotations

from html import escape

WIDTH, COLUMNS = 860, 2
LABELS, NUMBERS = 150, 60
"""Space left of a panel's bars for names, and right of them for values."""
BAR, GAP, TITLE = 16, 5, 30
OURS, THEIRS = "#0b7a75", "#a9b4bf"


def bars(title: str, panels: dict[str, dict[str, float]]) -> str:
    """`panels` holds the value of each side by row; the first side is ours. Longest bar first."""
    parts = [f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>']
    width = WIDTH // COLUMNS
    tops = [38.0] * COLUMNS
    for i, (name, values) in enumerate(panels.items()):
        x, y = (i % COLUMNS) * width, tops[i % COLUMNS]
        parts += _panel(name, values, x, y, width)
        tops[i % COLUMNS] += TITLE + len(values) * (BAR + GAP) + 10
    height = max(tops) + 4
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1d2733">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _panel(name: str, values: dict[str, float], x: float, y: float, width: float) -> list[str]:
    parts = [f'<text x="{x + 12}" y="{y + 18}" font-weight="bold">{escape(name)}</text>']
    ours = next(iter(values))
    longest = max(values.values())
    room = width - LABELS - NUMBERS
    for i, side in enumerate(sorted(values, key=lambda side: -values[side])):
        top = y + TITLE + i * (BAR + GAP)
        length = max(1.0, room * values[side] / longest)
        weight = ' font-weight="bold"' if side == ours else ""
        line = top + BAR - 4
        parts += [
            f'<text x="{x + LABELS - 6}" y="{line}" text-anchor="end"{weight}>{escape(side)}</text>',
            f'<rect x="{x + LABELS}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2" '
            f'fill="{OURS if side == ours else THEIRS}"/>',
            f'<text x="{x + LABELS + length + 5:.1f}" y="{line}"{weight}>{values[side]:,.0f}</text>',
        ]
    return parts
