"""Ledger: where a request's time went. Every moment from its arrival to its end belongs to one
state, in whole nanoseconds of one clock, so that the parts add up to the wall time exactly.

The scheduler writes one line at each transition; nothing here decides anything.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

State = Literal["queued", "fetching", "loading", "prefill", "decode", "preempted"]
"""Waits for a row; waits for cached blocks from below host memory, and from there; computes what it
knows; samples; lost its row and waits to be computed again."""

MAX_EVENTS = 256
"""Transitions that a ledger keeps; its times and counts go on without them."""


class Waits:
    """What the queue waited for until now: step (to end), rows, memory, budget (of a step's tokens).

    Of all that wait, time is counted once by cause, however many they are: each one's share is the
    difference between its coming and its going.
    """

    def __init__(self, now: float) -> None:
        self.cause = "step"
        self._since = nanoseconds(now)
        self._totals: dict[str, int] = {}

    def wait_for(self, cause: str, now: float) -> None:
        """From now on, this is what whoever waits waits for."""
        if cause != self.cause:
            at = nanoseconds(now)
            self._totals = self.totals(at)
            self.cause, self._since = cause, at

    def totals(self, at: int) -> dict[str, int]:
        """Nanoseconds by cause, up to `at`."""
        last = self._totals.get(self.cause, 0) + at - self._since
        return {**self._totals, self.cause: last}


class Ledger:
    """Of one request, which arrived at `arrival` and was told to the scheduler at `now`; seconds of
    its clock. What came before `now` was a wait for the step."""

    __slots__ = (
        *("arrival", "cached", "cause", "ended", "events", "largest_batch", "num_chunks"),
        *("num_prefilled", "preemptions", "state", "steps", "_causes", "_mark", "_since", "_waits"),
    )

    def __init__(self, waits: Waits, arrival: float, now: float) -> None:
        self._waits = waits
        self._mark: dict[str, int] = {}
        self._causes: dict[tuple[State, str], int] = {}
        self.arrival = self._since = nanoseconds(arrival)
        self.ended: int | None = None
        self.state: State = "queued"
        self.cause = "step"
        self.events: list[tuple[int, State, str]] = [(0, "queued", "")]
        """(nanoseconds since the arrival, state, cause)."""
        self.cached: dict[str, int] = {}
        """Prompt tokens that needed no computing, by the tier where they were found."""
        self.preemptions: dict[str, int] = {}
        """How often, by cause."""
        self.num_chunks = self.num_prefilled = 0
        """Spans of known tokens that were computed, and the tokens in them: more than the prompt
        has where it was preempted."""
        self.steps = self.largest_batch = 0
        """Steps that computed it, and the most requests that shared one of them with it."""
        self._close(nanoseconds(now))
        self._open("queued", "")

    def enter(self, state: State, now: float, cause: str = "") -> None:
        """From now on the request is in `state`."""
        if state == self.state and cause == self.cause:
            return
        # A plan's transitions are told with the time of its beginning, some with that of their own.
        at = max(nanoseconds(now), self._since)
        self._close(at)
        self._open(state, cause)
        if state == "preempted":
            self.preemptions[cause] = self.preemptions.get(cause, 0) + 1
        if len(self.events) < MAX_EVENTS:
            self.events.append((at - self.arrival, state, cause))

    def wait(self, cause: str, now: float) -> None:
        """In the queue, for a cause of its own; "": for what the queue waits for."""
        if self.state == "queued":
            self.enter("queued", now, cause)

    def found(self, tier: str, num_tokens: int) -> None:
        """So many of its prompt's tokens were in a cache."""
        self.cached[tier] = self.cached.get(tier, 0) + num_tokens

    def pass_by(self, batch: int) -> None:
        """A step took a chunk of it through some layers, together with batch - 1 other requests."""
        self.steps += 1
        self.largest_batch = max(self.largest_batch, batch)

    def step(self, num_tokens: int, batch: int, sampled: bool, now: float) -> None:
        """A step computed `num_tokens` of it, or the rest of their layers, together with batch - 1
        other requests."""
        self.steps += 1
        if batch > self.largest_batch:
            self.largest_batch = batch
        if self.state != "decode":
            self.num_chunks += 1
            self.num_prefilled += num_tokens
            if sampled:
                self.enter("decode", now)

    def end(self, now: float) -> None:
        self.ended = max(nanoseconds(now), self._since)
        self._close(self.ended)

    def causes(self, now: float) -> dict[tuple[State, str], int]:
        """Nanoseconds by state and cause until its end, or until now."""
        parts = dict(self._causes)
        if self.ended is None:
            self._add(parts, nanoseconds(now))
        return parts

    def parts(self, now: float) -> dict[str, int]:
        """The same by state alone: each is there."""
        parts: dict[str, int] = dict.fromkeys(get_args(State), 0)
        for (state, _), spent in self.causes(now).items():
            parts[state] += spent
        return parts

    def report(self, now: float) -> dict[str, Any]:
        """All of it, as JSON has it (docs/serving.md)."""
        causes: dict[str, dict[str, int]] = {}
        for (state, cause), spent in self.causes(now).items():
            if cause:
                causes.setdefault(state, {})[cause] = spent
        end = nanoseconds(now) if self.ended is None else self.ended
        return {
            "state": self.state if self.ended is None else "finished",
            "wall_ns": end - self.arrival,
            "parts_ns": self.parts(now),
            "causes_ns": causes,
            "cached_tokens": dict(self.cached),
            "prefill": {"chunks": self.num_chunks, "tokens": self.num_prefilled},
            "steps": self.steps,
            "largest_batch": self.largest_batch,
            "preemptions": dict(self.preemptions),
            "events": [
                {"at_ns": at, "state": state, **({"cause": cause} if cause else {})}
                for at, state, cause in self.events
            ],
        }

    def _open(self, state: State, cause: str) -> None:
        self.state, self.cause = state, cause
        if state == "queued":
            self._mark = self._waits.totals(self._since)

    def _close(self, at: int) -> None:
        self._add(self._causes, at)
        self._since = at

    def _add(self, parts: dict[tuple[State, str], int], at: int) -> None:
        spent = {self.cause: at - self._since}
        if self.state == "queued" and not self.cause:
            mark = self._mark.get
            spent = {c: total - mark(c, 0) for c, total in self._waits.totals(at).items()}
        for cause, part in spent.items():
            if part:
                key = self.state, cause
                parts[key] = parts.get(key, 0) + part


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
