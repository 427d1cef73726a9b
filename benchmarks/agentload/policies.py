"""Which session's blocks yield first: candidates for the rule of leases, compared in simulation only."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentload.load import Session
from elinvar.kv.tree import Node

INFINITY = math.inf


@dataclass(slots=True, eq=False)
class Lease:
    session: Session
    turn: int = 0
    since: float = 0.0
    """When its last turn ended."""
    due: tuple[float, ...] = ()
    """When it, and forks of it, will really come back: for oracles."""
    came: float = 0.0
    busy: bool = False
    """Its turn, which came at `came`, waits or runs."""
    path: list[Node] = field(default_factory=list)
    """What it has not given up, from the beginning."""
    below: list[bytes] = field(default_factory=list)
    """Keys of all of it in host memory, as far as it is there."""

    @property
    def tool(self) -> str:
        """What it waits for. Its client's request for a tool names it."""
        turn = min(self.turn + 1, len(self.session.tools) - 1)
        return self.session.tools[turn]


class Order:
    """A policy. The lease of the lowest worth yields first."""

    uses_leases = True

    def worth(self, lease: Lease, now: float) -> float:
        """Asked where it uses leases."""
        return 0.0

    def paused(self, lease: Lease, now: float) -> None:
        """A turn has ended."""

    def returned(self, lease: Lease, now: float) -> None:
        """Its next turn has come."""


class Blocks(Order):
    """What the pool does alone: blocks, least recently used first."""

    uses_leases = False


class Recency(Order):
    """Leases, least recently used first; those that ended with notice before all others."""

    def worth(self, lease: Lease, now: float) -> float:
        over = lease.session.notice and lease.turn + 1 == len(lease.session.turns)
        return -INFINITY if over else lease.since


class Oracle(Order):
    """Farthest next use first (Belady, 1966), the future known, ends included."""

    def worth(self, lease: Lease, now: float) -> float:
        return -min((at for at in lease.due if at > now), default=INFINITY)


class Hints:
    """What clients expect, times lognormal noise of `sigma`. Who will end without notice says what his
    last pause was; 0 is an end."""

    def __init__(self, sigma: float = 0.0) -> None:
        self._sigma, self._rng = sigma, random.Random(7)

    def of(self, lease: Lease) -> float:
        session, next_turn = lease.session, lease.turn + 1
        if next_turn < len(session.turns):
            pause = session.pauses[next_turn]
        else:
            pause = 0.0 if session.notice else session.pauses[lease.turn] or 1.0
        return pause * (self._rng.lognormvariate(0, self._sigma) if self._sigma else 1.0)


class Trusting(Order):
    """Farthest expected return first, by hints. Who is late goes before everybody who is not, the
    latest, measured by his hint, first."""

    def __init__(self, hints: Hints) -> None:
        self._hints = hints
        self._expected: dict[Lease, float] = {}

    def paused(self, lease: Lease, now: float) -> None:
        self._expected[lease] = self._hints.of(lease)

    def worth(self, lease: Lease, now: float) -> float:
        expected = self._expected[lease]
        if expected == 0.0:
            return -INFINITY
        left = lease.since + expected - now
        return -left if left >= 0 else -1e6 + left / expected


BIN = 2.0**0.25
FIRST = 0.05
NUM_BINS = 80


def bin_of(seconds: float) -> int:
    if seconds <= FIRST:
        return 0
    return min(NUM_BINS - 1, 1 + int(math.log(seconds / FIRST, BIN)))


EDGES = [0.0] + [FIRST * BIN**i for i in range(NUM_BINS)]


class Learned(Order):
    """By the chance to come back a second of waiting, from the history of pauses of a class.

    Per class and bin of age, four to a factor of 2: how many came back, and how many seconds
    were waited in it, by those who came back and by those who (so far) did not. Their quotient is the hazard
    (Nelson, 1969; Aalen, 1978), right for histories that are cut off. Worth is the best ratio of chance to
    come back to expected seconds of waiting over all horizons (Gittins, 1979; the hit density of
    Beckmann, Chen and Cidon, 2018): for blocks of equal size and price the index of what to keep.

    hints: ages are measured by what the client expected, so that what is learned is how right such
    clients are.
    """

    def __init__(
        self, classes: Callable[[Lease], str], hints: Hints | None = None, prior: float = 1.0
    ) -> None:
        self._classes, self._hints, self._prior = classes, hints, prior
        self._returns: dict[str, list[float]] = {}
        self._waited: dict[str, list[float]] = {}
        self._open: dict[Lease, tuple[str, float, float]] = {}
        """Class, beginning and unit of each pause that has not ended."""
        self._index: dict[str, list[float]] = {}
        self._settled, self._learnt = 0, -1

    def paused(self, lease: Lease, now: float) -> None:
        self._settle(lease, now, came_back=False)
        unit = self._hints.of(lease) if self._hints is not None else 1.0
        self._open[lease] = self._classes(lease), now, unit

    def returned(self, lease: Lease, now: float) -> None:
        self._settle(lease, now, came_back=True)

    def _settle(self, lease: Lease, now: float, came_back: bool) -> None:
        kind, since, unit = self._open.pop(lease, ("", 0.0, 0.0))
        if unit:
            self._settled += 1
            age = (now - since) / unit
            self._book(kind, age, self._waited)
            if came_back:
                self._returns.setdefault(kind, [0.0] * NUM_BINS)[bin_of(age)] += 1

    @staticmethod
    def _book(kind: str, seconds: float, into: dict[str, list[float]]) -> None:
        row = into.setdefault(kind, [0.0] * NUM_BINS)
        for index in range(NUM_BINS):
            upper = EDGES[index + 1] if index + 1 < len(EDGES) else INFINITY
            row[index] += min(seconds, upper) - EDGES[index]
            if seconds <= upper:
                return

    def worth(self, lease: Lease, now: float) -> float:
        if self._settled > self._learnt * 1.05 + 20 or self._learnt < 0:
            self._learn(now)
        kind, since, unit = self._open[lease]
        if unit == 0.0:
            return -INFINITY
        row = self._index.get(kind)
        age = (now - since) / unit
        return (row[bin_of(age)] if row is not None else 1.0 / (age + 1.0)) / unit

    def _learn(self, now: float) -> None:
        """The index of every class and age, from what is known now; anew when a twentieth more is."""
        self._learnt = self._settled
        waited = {kind: list(row) for kind, row in self._waited.items()}
        for kind, since, unit in self._open.values():
            if unit:
                self._book(kind, (now - since) / unit, waited)
        everybody = [[0.0] * NUM_BINS, [0.0] * NUM_BINS]
        for kind, row in waited.items():
            back = self._returns.get(kind, [0.0] * NUM_BINS)
            for index in range(NUM_BINS):
                everybody[0][index] += back[index]
                everybody[1][index] += row[index]
        self._index = {
            kind: self._gittins(self._returns.get(kind, [0.0] * NUM_BINS), row, everybody)
            for kind, row in waited.items()
        }

    def _gittins(
        self, back: list[float], waited: list[float], everybody: Sequence[list[float]]
    ) -> list[float]:
        hazard = []
        for index in range(NUM_BINS):
            width = EDGES[min(index + 1, NUM_BINS)] - EDGES[index] or EDGES[-1]
            # Until a class has a history of its own it is as everybody.
            rate = (everybody[0][index] + 0.1) / (everybody[1][index] + width)
            weight = self._prior * width
            hazard.append((back[index] + rate * weight) / (waited[index] + weight))
        out = []
        for first in range(NUM_BINS):
            here, chance, seconds, best = 1.0, 0.0, 0.0, 0.0
            for index in range(first, NUM_BINS):
                width = EDGES[min(index + 1, NUM_BINS)] - EDGES[index] or EDGES[-1]
                gone = -math.expm1(-hazard[index] * width)
                seconds += here * gone / max(hazard[index], 1e-12)
                chance += here * gone
                here *= 1 - gone
                best = max(best, chance / seconds) if seconds else best
            out.append(best)
        return out


def alike(lease: Lease) -> str:
    return ""


def by_tool(lease: Lease) -> str:
    return lease.tool


def by_past(lease: Lease) -> str:
    """The session's pause before this one, within a factor of four."""
    if lease.turn == 0 and lease.session.conversation.parent is None:
        return "first"
    return str(bin_of(lease.session.pauses[lease.turn]) // 8)
