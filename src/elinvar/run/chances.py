"""What drafts are worth: how likely each is to be accepted, and what steps that verify them cost.

Learned while serving, with short memories. Nothing here changes an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

BUCKETS = 10
PRIOR = 4.0
"""Verified drafts that an expectation is worth."""
FADE = 0.98
"""Of what was counted before, at each draft of a drafter."""
FADE_ROW = 0.9
"""The same at each step of a row: it may come to another kind of text."""
POSITIONS = 4
"""That a row counts apart: the first ones, and all behind them."""


class _Counts:
    __slots__ = ("hits", "trials")

    def __init__(self) -> None:
        self.hits = self.trials = 0.0

    def add(self, hit: bool, fade: float) -> None:
        self.hits = fade * self.hits + hit
        self.trials = fade * self.trials + 1

    def beside(self, expected: float) -> float:
        return (PRIOR * expected + self.hits) / (PRIOR + self.trials)


class Chances:
    """Of one drafter. What it says of a draft is held against what came of such drafts, and that against
    what came of those of the same row at the same place of a chain."""

    def __init__(self) -> None:
        self._said = [_Counts() for _ in range(BUCKETS + 1)]
        self._places = [_Counts() for _ in range(POSITIONS)]
        self._rows: dict[int, list[_Counts]] = {}

    def of(self, row: int, said: Sequence[float], least: float = 0.0) -> list[float]:
        """Of each draft of a chain: that it and those before it are accepted; as long as that is at
        least so likely."""
        own = self._rows.get(row)
        chance, chances = 1.0, list[float]()
        for place, value in enumerate(said):
            value = _chance(value)
            expected = self._said[round(value * BUCKETS)].beside(value)
            if own is not None:
                expected = own[min(place, POSITIONS - 1)].beside(expected)
            chance *= expected
            if chance < least:
                break
            chances.append(chance)
        return chances

    def expected(self, row: int, count: int, at_first: float = 0.7) -> list[float]:
        """The same of a chain that is not made yet."""
        own = self._rows.get(row)
        chance, chances = 1.0, []
        for place in range(count):
            at = min(place, POSITIONS - 1)
            expected = self._places[at].beside(at_first)
            if own is not None:
                expected = own[at].beside(expected)
            chance *= expected
            chances.append(chance)
        return chances

    def learn(self, row: int, said: Sequence[float], accepted: int) -> None:
        """So many of a chain that was verified were right; of those behind the first wrong one nothing
        is known."""
        own = self._rows.get(row)
        if own is None:
            own = self._rows[row] = [_Counts() for _ in range(POSITIONS)]
        for counts in own:
            counts.hits *= FADE_ROW
            counts.trials *= FADE_ROW
        for place, value in enumerate(said[: accepted + 1]):
            hit, at = place < accepted, min(place, POSITIONS - 1)
            self._said[round(_chance(value) * BUCKETS)].add(hit, FADE)
            self._places[at].add(hit, FADE)
            own[at].add(hit, 1.0)

    def forget(self, row: int) -> None:
        self._rows.pop(row, None)


def _chance(said: float) -> float:
    """Also of what is no number."""
    return min(max(0.0, said), 1.0)


SLOPE = 0.1
"""Where nothing is measured, a further draft costs so much of a step without."""
MAX_CURVES = 64
FIRST = 3
"""Measurements of which the least counts: shapes are recorded at their first use."""
OLD = 256
"""Steps after which a measurement is forgotten. A number of drafts that seemed too slow is not chosen,
hence not measured, until then."""


@dataclass(slots=True)
class _Point:
    seconds: float
    at: int
    """The step that measured it last."""
    count: int = 1


class Curve:
    """Seconds of steps in which so many rows decode, by the number of drafts that are verified."""

    __slots__ = ("_now", "_points", "_slope", "age")

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}
        self._slope = SLOPE
        self._now = 0
        self.age = 0
        """Steps with drafts since the last one without."""

    @property
    def plain(self) -> float | None:
        """Without drafts."""
        point = self._points.get(0)
        return None if point is None else point.seconds

    def book(self, drafts: int, seconds: float) -> None:
        self._now += 1
        self.age = self.age + 1 if drafts else 0
        at, plain = grid(drafts), self.plain
        point = self._points.get(at)
        if point is None:
            self._points[at] = _Point(seconds, self._now)
        else:
            point.count, point.at = point.count + 1, self._now
            if point.count <= FIRST:
                point.seconds = min(point.seconds, seconds)
            else:  # a hiccup is not the machine
                point.seconds += (min(seconds, 1.5 * point.seconds) - point.seconds) / 8
        if drafts and plain is not None:
            slope = min(max(0.0, seconds / plain - 1) / drafts, 1.0)
            self._slope += (slope - self._slope) / 8

    def least(self, rows: int) -> float:
        """Drafts that are less likely than this to be accepted are not worth their place in any step: a
        quarter of the chance at which one of usual price pays, as some come cheaper."""
        return min(rows * self._slope, 2.0) / 4

    def upto(self, most: int) -> list[float]:
        """Of 0 .. most drafts; `plain` must be known."""
        for drafts in [d for d, p in self._points.items() if d and self._now - p.at > OLD]:
            del self._points[drafts]
        known = sorted(self._points)
        found: list[float] = []
        for low, high in pairwise([*known, max(most, known[-1]) + 1]):
            begin = self._points[low].seconds
            if high in self._points:
                rise = (self._points[high].seconds - begin) / (high - low)
            else:
                rise = self._slope * self._points[0].seconds
            found += [begin + rise * i for i in range(high - low)]
        return list(accumulate(found[: most + 1], max))


def grid(drafts: int) -> int:
    """Numbers of drafts that are measured together have one: four of each power of two."""
    step = 1 << max(0, drafts.bit_length() - 3)
    return -(-drafts // step) * step


class Costs:
    """Curves by the number of rows."""

    def __init__(self) -> None:
        self._curves: OrderedDict[int, Curve] = OrderedDict()

    def of(self, rows: int) -> Curve:
        curve = self._curves.get(rows)
        if curve is None:
            curve = self._curves[rows] = Curve()
            if len(self._curves) > MAX_CURVES:
                self._curves.popitem(last=False)
        self._curves.move_to_end(rows)
        return curve


ALLOWANCE = 0.005
"""Of the time that passes, what a drafter may lose."""
CREDIT = 4.0
"""Steps whose time it may lose besides, once; and again when it has gained it."""


class Account:
    """What a drafter has cost and gained, in seconds. One that is empty is not asked until the time it
    may lose has come together again: so whatever it does, it costs a set share at most."""

    __slots__ = ("_balance",)

    def __init__(self) -> None:
        self._balance: float | None = None

    @property
    def is_open(self) -> bool:
        return self._balance is None or self._balance > 0

    def pass_by(self, seconds: float, plain: float) -> None:
        """A step went by; plain: seconds of one without drafts."""
        if self._balance is None:
            self._balance = CREDIT * plain
        self._balance = min(self._balance + ALLOWANCE * seconds, CREDIT * plain)

    def book(self, gained: float) -> None:
        """Below 0: lost."""
        self._balance = (self._balance or 0.0) + gained
