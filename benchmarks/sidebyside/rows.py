"""What is measured: jobs, and the rows of the table that each of them fills.

A job is one thing that a side (Elinvar, or a peer) is asked to do; a row is one number of the
result files. This module knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PROMPT = 128
"""Tokens of each prompt before decode is timed."""
STEPS = 128
"""Decode steps that are timed."""
LONG_PROMPT = 8064
LONG_STEPS = 64
"""Together they end within a context of 8,192 tokens."""

Kind = Literal["start", "decode", "prefill", "long", "concurrent"]
Values = dict[str, float]
"""Numbers by row."""


@dataclass(frozen=True, slots=True)
class Job:
    kind: Kind
    size: int = 0
    """decode: rows at once; prefill and long: tokens of the prompt; concurrent: the larger batch."""

    @property
    def rows(self) -> tuple[str, ...]:
        match self.kind:
            case "start":
                return ("start",)
            case "prefill":
                return (f"prefill {self.size}",)
            case "decode":
                memory = (f"memory {self.size}",) if self.size in (1, 32) else ()
                return (f"decode {self.size}", *memory)
            case "long":
                return (f"prefill {self.size}", f"decode at {self.size}")
            case "concurrent":
                return (f"{self.size} over {self.size // 2}",)

    @property
    def repeats(self) -> int:
        """Short jobs are done several times within a round, and their median is the round's."""
        return 3 if self.kind == "prefill" or (self.kind == "decode" and self.size <= 4) else 1


# In this order within a process: peak memory only grows, so batch 1 must come first.
JOBS: tuple[Job, ...] = (
    Job("start"),
    Job("decode", 1),
    Job("decode", 4),
    Job("decode", 16),
    Job("decode", 32),
    Job("prefill", 512),
    Job("concurrent", 64),
    Job("long", LONG_PROMPT),
)
QUICK = (Job("decode", 1), Job("decode", 16), Job("prefill", 512))


def unit(row: str) -> str:
    kind = row.split()[0]
    if kind in ("prefill", "decode"):
        return "tok/s"
    return {"start": "s", "memory": "MB"}.get(kind, "x")


def more_is_better(row: str) -> bool:
    return unit(row) in ("tok/s", "x")


def chosen(only: list[str]) -> tuple[Job, ...]:
    """The jobs that fill the rows named, in full or by their first word; all where none is."""
    found = JOBS
    if only:
        found = tuple(job for job in JOBS if any({r, r.split()[0]} & set(only) for r in job.rows))
    if not found:
        known = ", ".join(f'"{row}"' for job in JOBS for row in job.rows)
        raise SystemExit(f"--only {' '.join(only)} names no row; there are {known}.")
    return found
