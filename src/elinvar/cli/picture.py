"""What `elinvar top` draws: one live picture of a server, as wide and high as the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

KEPT = 300
"""Seconds of the sparklines."""
_BARS = " ▁▂▃▄▅▆▇█"
_STATES = {"held": "cyan", "leased": "magenta", "cached": "yellow", "free": "bright_black"}
_NUMBERS = "age", "prompt", "cached", "output"
_OWNERS = "tenant", "session"
_WIDE = 80
"""Columns from which the requests' owners are shown."""
_STATE_COLORS = {"decode": "cyan", "prefill": "yellow", "preempted": "red"}


class Picture:
    """A rich renderable: `push` gives it what the server said."""

    def __init__(self) -> None:
        self._live: dict[str, Any] = {}
        self._rates: dict[str, dict[str, deque[float]]] = {}
        self.problem = ""
        """Why there is nothing new."""

    def push(self, live: dict[str, Any]) -> None:
        self._live = live
        for model in live["models"]:
            rates = self._rates.setdefault(model["name"], {})
            for kind in ("output", "prompt"):
                if (past := model.get("history")) is not None:
                    rates[kind] = deque(past[kind], KEPT)
                rates.setdefault(kind, deque(maxlen=KEPT)).append(model["tokens_per_s"][kind])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or options.max_height
        parts: list[RenderableType] = [self._head()]
        for model in self._live["models"]:
            parts += ["", *self._model(model, width)]
        parts += ["", self._requests(max(1, height - len(parts) - 5), width), self._foot()]
        for part in parts:
            if isinstance(part, Text):
                part.no_wrap, part.overflow = True, "ellipsis"
        yield Group(*parts)

    def _head(self) -> Text:
        live, memory = self._live, self._live["memory"]
        rss = "" if memory["rss"] is None else f"   memory {_bytes(memory['rss'])}"
        head = Text.assemble(
            ("Elinvar", "bold"), f" {live['version']}   up {_time(live['uptime_s'])}"
        )
        return head.append(f"{rss}   KV cache up to {_bytes(memory['kv'])}", "dim")

    def _foot(self) -> Text:
        if self.problem:
            return Text(self.problem, "red")
        return Text("q ends", "dim")

    def _model(self, model: dict[str, Any], width: int) -> Iterable[RenderableType]:
        rows, blocks, hits = model["rows"], model["kv"]["blocks"], model["prefix_hit_rate"]
        state = "green" if model["state"] == "ready" else "red"
        yield Text.assemble(
            (model["name"], "bold"), " ", (model["state"], state), "   running ",
            (str(rows["running"]), "bold"), f" of {rows['max']}   waiting ",
            (str(rows["waiting"]), "bold yellow" if rows["waiting"] else "bold"),
            "   prefix hits ", ("–" if hits is None else f"{hits:.0%}", "bold"),
        )  # fmt: skip
        room = max(10, width - 30)
        for kind, color in (("output", "cyan"), ("prompt", "yellow")):
            rate, past = model["tokens_per_s"][kind], self._rates[model["name"]][kind]
            yield Text.assemble(
                f"{kind:<8}", (f"{rate:>9,.1f}", "bold"), " tok/s  ", (sparkline(past, room), color)
            )
        yield _times(model)
        yield Text.assemble(
            "KV      ", _bar(blocks, max(10, min(40, width - 60))), "  ", _legend(blocks)
        )

    def _requests(self, most: int, width: int) -> RenderableType:
        found = [one for model in self._live["models"] for one in model["requests"]]
        if not found:
            return Text("Nothing runs.", "dim")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        names = [name for name in _OWNERS if width >= _WIDE and any(one[name] for one in found)]
        for name in ("request", "state", *_NUMBERS, *names):
            table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
        for one in found[:most]:
            state = Text(one["state"], _STATE_COLORS.get(one["state"], ""))
            counts = [f"{one[f'{name}_tokens']:,}" for name in _NUMBERS[1:]]
            owners = [_plain(one[name] or "") for name in names]
            table.add_row(_plain(one["id"][:18]), state, f"{one['age_s']:.1f} s", *counts, *owners)
        if len(found) > most:
            table.add_row(Text(f"and {len(found) - most} more", "dim"))
        return table


def _plain(text: str) -> Text:
    """Names are their owners' words: without control characters, and no markup."""
    return Text("".join(c if c.isprintable() else "?" for c in text), overflow="ellipsis")


def _times(model: dict[str, Any]) -> Text:
    text = Text()
    for name, title in (("ttft_ms", "first token"), ("itl_ms", "between"), ("step_ms", "step")):
        values = ["–" if v is None else f"{v:,.1f}" for v in model[name].values()]
        text.append(f"{title} ", "dim").append(" / ".join(values)).append(" ms   ", "dim")
    return text.append("(p50 / p95 / p99)", "dim")


def sparkline(values: Sequence[float] | deque[float], width: int) -> str:
    """The last values, each `width`th part of them one bar: the highest of its seconds."""
    kept = list(values)
    size = max(1, -(-len(kept) // width))
    start = len(kept) % size
    groups = [
        kept[max(0, i) : i + size] for i in range(start - size if start else 0, len(kept), size)
    ]
    peaks = [max(group) for group in groups if group][-width:]
    most = max(peaks, default=0.0) or 1.0
    return "".join(_BARS[min(8, -(-int(8000 * peak / most) // 1000))] for peak in peaks)


def _bar(blocks: dict[str, int], width: int) -> Text:
    """Blocks by state: each that there is gets a part of the bar."""
    text, begun, total = Text(), 0, max(1, blocks["total"])
    drawn = 0
    for state, color in _STATES.items():
        begun += blocks.get(state, 0)
        end = width if state == "free" else round(width * begun / total)
        end = max(end, drawn + 1) if blocks.get(state) and drawn < width else max(end, drawn)
        text.append(("█" if state != "free" else "░") * (end - drawn), color)
        drawn = end
    return text


def _legend(blocks: dict[str, int]) -> Text:
    text = Text()
    for state, color in _STATES.items():
        if state in blocks:
            text.append(f"{blocks[state]:,} ", f"bold {color}").append(f"{state}  ", "dim")
    return text


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] in ("GiB", "TiB") else f"{size:.0f} {units[0]}"


def _time(seconds: float) -> str:
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"
