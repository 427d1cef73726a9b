"""What `bench serve` measures of each request, and the figures that sum it up.

TTFT counts from when a request was due, not from when it was sent: a client that falls behind must
not look like a quick server, and `late_ms` tells how far behind it fell. ITL is each gap between arrivals of tokens; TPOT is a request's time
after its first token over its other tokens.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elinvar.base.errors import ElinvarError
from elinvar.cli.bench.workload import Arrival

PERCENTILES = (50, 90, 99)


class RequestError(ElinvarError):
    """A request that was not answered. kind: a word or two, by which such are counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Record:
    arrival: Arrival
    due: float
    """Clock of time.perf_counter, as all times here."""
    sent: float | None = None
    """None: it was not."""
    times: list[float] = field(default_factory=list)
    """When tokens came."""
    tokens: int = 0
    done: bool = False
    kind: str = ""
    """Of the error."""
    error: str | None = None
    turn: int = 0
    """Of its conversation."""
    prompt_tokens: int = 0
    """As whoever was asked counts them; 0: it did not say."""

    def came(self, tokens: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens += tokens

    @property
    def ttft(self) -> float:
        return self.times[0] - self.due

    @property
    def e2e(self) -> float:
        return self.times[-1] - self.due

    @property
    def tpot(self) -> float | None:
        """None: one token has no other."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Goals:
    """The largest seconds that a request may take to be a good one; None: any."""

    ttft: float | None = None
    itl: float | None = None
    """Each wait between two of its tokens."""
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, one: Record) -> bool:
        longest = max(one.gaps, default=None)
        pairs = (
            (self.ttft, one.ttft),
            (self.itl, longest),
            (self.tpot, one.tpot),
            (self.e2e, one.e2e),
        )
        return all(goal is None or value is None or value <= goal for goal, value in pairs)

    def given(self) -> dict[str, float]:
        return {
            name: 1000 * goal
            for name in self.__slots__
            if (goal := getattr(self, name)) is not None
        }


def summary(records: Sequence[Record], goals: Goals) -> dict[str, Any]:
    """Figures of the requests that were sent; latencies of those that were answered to the end."""
    done = [one for one in records if one.done]
    failed = [one for one in records if one.error is not None]
    sent = [one for one in records if one.sent is not None]
    last = max((one.times[-1] for one in sent if one.times), default=0.0)
    seconds = max(last - min((one.due for one in sent), default=0.0), 0.0)
    tokens = sum(one.tokens for one in sent)
    prompt_tokens = sum(one.prompt_tokens or one.arrival.prompt_tokens for one in sent if one.times)

    def a_second(amount: float) -> float:
        return round(amount / seconds, 3) if seconds else 0.0

    found: dict[str, Any] = {
        "requests": len(records),
        "completed": len(done),
        "failed": len(failed),
        "unfinished": len(records) - len(done) - len(failed),
        "seconds": round(seconds, 3),
        "requests_per_s": a_second(len(done)),
        "output_tokens_per_s": a_second(tokens),
        "total_tokens_per_s": a_second(tokens + prompt_tokens),
        "ttft_ms": _spread(done, lambda one: [one.ttft]),
        "itl_ms": _spread(done, lambda one: one.gaps),
        "tpot_ms": _spread(done, lambda one: [] if one.tpot is None else [one.tpot]),
        "e2e_ms": _spread(done, lambda one: [one.e2e]),
        "late_ms": _spread(sent, lambda one: [max(0.0, (one.sent or one.due) - one.due)]),
    }
    if goals.given():
        good = sum(goals.met_by(one) for one in done)
        ended = len(done) + len(failed)
        found["goodput"] = {
            "goals_ms": goals.given(),
            "requests_per_s": a_second(good),
            "share": round(good / ended, 4) if ended else 0.0,
        }
    if failed:
        found["errors"] = dict(Counter(one.kind for one in failed))
        found["error_examples"] = {one.kind: one.error for one in reversed(failed)}
    return found


def _spread(
    done: Sequence[Record], values: Callable[[Record], list[float]]
) -> dict[str, float] | None:
    """Mean and percentiles in ms; None where nothing was measured."""
    found = sorted(1000 * value for one in done for value in values(one))
    if not found:
        return None
    # The value that a share of all values does not exceed: one that was measured.
    at = {f"p{p}": found[max(0, -(-p * len(found) // 100) - 1)] for p in PERCENTILES}
    return {name: round(v, 3) for name, v in {"mean": statistics.fmean(found), **at}.items()}
