"""What is to be reached, and whether the results say so. The targets are those that the project set
itself before the work on speed; they are not moved afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sidebyside.results import Report, Spread, best, ratio, spread

Against = Literal["llama.cpp", "best 4-bit peer", "each Python peer", "itself"]


@dataclass(frozen=True, slots=True)
class Target:
    model: str
    """Part of the model's file name, in small letters."""
    row: str
    against: Against
    bound: float
    at_most: bool = False
    seconds: bool = False
    """The bound is on the difference, in seconds, not on the ratio."""

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{sign} it + {self.bound} s" if self.seconds else f"{sign} {self.bound:.3g}x"


@dataclass(frozen=True, slots=True)
class Measured:
    peer: str
    value: Spread
    report: Report


def _three(model: str, against: Against, prompt: float, one: float, many: float) -> list[Target]:
    """Prompt, batch 1, batches 16 and 32."""
    bounds = {"prefill 512": prompt, "decode 1": one, "decode 16": many, "decode 32": many}
    return [Target(model, row, against, bound) for row, bound in bounds.items()]


TARGETS = (
    *_three("q4_1", "llama.cpp", 5, 2, 4),
    *_three("q4_1", "best 4-bit peer", 2, 1.5, 2.2),
    *_three("q8_0", "llama.cpp", 1.5, 1.5, 2.5),
    *_three(".f16", "llama.cpp", 1.1, 1.4, 2),
    *_three("bf16", "llama.cpp", 1.1, 1.4, 2),
    *_three("gemma", "llama.cpp", 2.5, 1.5, 3),
    Target("q4_1", "start", "llama.cpp", 0.3, at_most=True, seconds=True),
    Target("q4_1", "start", "each Python peer", 1, at_most=True),
    Target("q4_1", "memory 1", "llama.cpp", 1.25, at_most=True),
    Target("q4_1", "memory 32", "llama.cpp", 1.25, at_most=True),
    Target("q4_1", "memory 1", "each Python peer", 1 / 3, at_most=True),
    Target("q4_1", "memory 32", "each Python peer", 1 / 3, at_most=True),
    Target("q4_1", "prefill 8064", "llama.cpp", 2),
    Target("q4_1", "64 over 32", "itself", 0.95),
)


def measured(target: Target, reports: list[Report]) -> Measured | None:
    """By the newest report that has the target's row and rival."""
    for report in reversed(reports):
        if target.model in report["model"].lower():
            found = _measured(target, report)
            if found:
                return found
    return None


def _measured(target: Target, report: Report) -> Measured | None:
    rounds, row = report["rounds"], target.row
    rivals = [side for side in report["sides"] if side != "elinvar" and spread(rounds, side, row)]
    if target.against == "itself":
        value = spread(rounds, "elinvar", row)
        return Measured("itself", value, report) if value else None
    if target.against == "llama.cpp":
        peer = "llama.cpp" if "llama.cpp" in rivals else None
    elif target.against == "best 4-bit peer":
        # A run against llama.cpp alone says nothing about the best of them.
        four_bit = [side for side in rivals if report["sides"][side]["four_bit"]]
        peer = best(rounds, four_bit, row) if len(four_bit) > 1 else None
    else:
        # The best of them is the one that is hardest to beat.
        peer = best(rounds, [side for side in rivals if not side.startswith("llama.cpp")], row)
    if peer is None:
        return None
    value = _difference(report, peer, row) if target.seconds else ratio(rounds, peer, row)
    return Measured(peer, value, report) if value else None


def _difference(report: Report, peer: str, row: str) -> Spread | None:
    pairs = zip(report["rounds"]["elinvar"], report["rounds"][peer], strict=False)
    found = [ours[row] - theirs[row] for ours, theirs in pairs if row in ours and row in theirs]
    return Spread.of(found) if found else None
