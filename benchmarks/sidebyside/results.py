"""Result files: what they hold, where they lie, and what got slower since the last one.

A file is one run on one model. `rounds` is the measurement; `summary` is what follows from it, for
people who read the file. Values are tokens/s (prefill, decode), seconds (start), 10^6 bytes
(memory), or a ratio ("64 over 32").
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidebyside.rows import Values, more_is_better, unit

FOLDER = Path(__file__).parent.parent / "results"
Rounds = dict[str, list[Values]]
"""Each side's values, round by round. A side that failed has fewer rounds, or fewer rows in one."""
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of some rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


def rows_of(rounds: Rounds) -> list[str]:
    return list(dict.fromkeys(row for values in rounds["elinvar"] for row in values))


def spread(rounds: Rounds, side: str, row: str) -> Spread | None:
    values = [values[row] for values in rounds.get(side, []) if row in values]
    return Spread.of(values) if values else None


def ratio(rounds: Rounds, side: str, row: str) -> Spread | None:
    """Elinvar's value over the side's, each round by itself: neighbours slow both down."""
    pairs = zip(rounds["elinvar"], rounds.get(side, []), strict=False)
    ratios = [ours[row] / theirs[row] for ours, theirs in pairs if row in ours and row in theirs]
    return Spread.of(ratios) if ratios else None


def best(rounds: Rounds, sides: list[str], row: str) -> str | None:
    """The side with the best median in the row."""
    found = {side: s.median for side in sides if (s := spread(rounds, side, row))}
    pick = max if more_is_better(row) else min
    return pick(found, key=lambda side: found[side], default=None)


def summary(rounds: Rounds) -> dict[str, Any]:
    """Per row: the medians, and the median and range of each peer's ratios."""
    table: dict[str, Any] = {}
    for row in rows_of(rounds):
        medians = {side: s.median for side in rounds if (s := spread(rounds, side, row))}
        ratios = {
            side: [round(r.median, 3), round(r.low, 3), round(r.high, 3)]
            for side in rounds
            if side != "elinvar" and (r := ratio(rounds, side, row))
        }
        table[row] = {
            "unit": unit(row),
            "median": {side: round(value, 3) for side, value in medians.items()},
            "ratio": ratios,
        }
    return table


def cpu_name() -> str:
    """Hypervisors shorten the model's name, so its numbers are part of it."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    if "model name" not in info:
        return platform.machine()
    numbers = f"family {info.get('cpu family', '?')} model {info.get('model', '?')}"
    return f"{info['model name']}, {numbers}"


def write(report: Report, out: Path | None = None) -> Path:
    """To `out`, or to DATE-CPU-MODEL.json among the results, numbered where that is taken."""
    if out is None:
        model = Path(report["model"]).stem
        slug = re.sub(r"[^a-z0-9]+", "-", f"{report['cpu']} {model}".lower()).strip("-")
        stem = f"{report['date'][:10]}-{slug}"
        out, number = FOLDER / f"{stem}.json", 1
        while out.exists():
            number += 1
            out = FOLDER / f"{stem}-{number}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    # Lists of numbers on one line: people read these files.
    text = re.sub(r"\[[^][{}\"]*\]", lambda m: " ".join(m[0].split()), text)
    out.write_text(text + "\n")
    return out


def load_all(folder: Path = FOLDER) -> list[Report]:
    """Oldest first."""
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(reports, key=lambda report: report["date"])


def last_with(reports: list[Report], now: Report, row: str) -> Report | None:
    """The last report from before `now`, of the same machine and model, that has the row."""
    same = ("cpu", "threads", "model")
    for report in reversed(reports):
        earlier = report["date"] < now["date"] and all(report[key] == now[key] for key in same)
        if earlier and row in rows_of(report["rounds"]):
            return report
    return None


def regressions(now: Report, reports: list[Report], tolerance: float = 0.05) -> list[str]:
    """A line for each row in which Elinvar is worse than last time by more than `tolerance`, the
    ranges apart. What llama.cpp did meanwhile is told: then it may be the machine."""
    lines = []
    for row in rows_of(now["rounds"]):
        before = last_with(reports, now, row)
        new, old = spread(now["rounds"], "elinvar", row), None
        if before:
            old = spread(before["rounds"], "elinvar", row)
        if not (before and new and old) or new.overlaps(old):
            continue
        change = new.median / old.median - 1
        if (change if not more_is_better(row) else -change) <= tolerance:
            continue
        line = (
            f"{row}: {old.median:,.4g} [{old.low:,.4g} - {old.high:,.4g}] on {before['date'][:10]}, "
            f"now {new.median:,.4g} [{new.low:,.4g} - {new.high:,.4g}] {unit(row)} ({change:+.0%})"
        )
        then, since = (spread(r["rounds"], "llama.cpp", row) for r in (before, now))
        if then and since:
            line += f"; llama.cpp meanwhile {since.median / then.median - 1:+.0%}"
        lines.append(line)
    return lines
