"""What drafts are worth: how likely each is to be accepted, and what steps that verify them cost.

Learned while serving, with short memories. Nothing here changes an answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

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

    def of(self, row: int, said: Sequence[float]) -> list[float]:
        """Of each draft of a chain: that it and those before it are accepted."""
        own = self._rows.get(row)
        chance, chances = 1.0, []
        for place, value in enumerate(said):
            expected = self._said[round(value * BUCKETS)].beside(value)
            if own is not None:
                expected = own[min(place, POSITIONS - 1)].beside(expected)
            chance *= expected
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
            self._said[round(value * BUCKETS)].add(hit, FADE)
            self._places[at].add(hit, FADE)
            own[at].add(hit, 1.0)

    def forget(self, row: int) -> None:
        self._rows.pop(row, None)


SLOPE = 0.1
"""Where nothing is measured, a further row costs so much of a step with one."""
MAX_CURVES = 64
FIRST = 3
"""Measurements of which the least counts: shapes are recorded at their first use."""


class Curve:
    """Seconds of steps in which `rows` rows decode, by the number of drafts that are verified."""

    __slots__ = ("_counts", "_rows", "_seconds", "age")

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self.age = 0
        """Steps with drafts since the last one without."""

    @property
    def plain(self) -> float | None:
        """Without drafts."""
        return self._seconds.get(0)

    def book(self, drafts: int, seconds: float) -> None:
        at = grid(drafts)
        self.age = self.age + 1 if drafts else 0
        before, count = self._seconds.get(at), self._counts.get(at, 0)
        self._counts[at] = count + 1
        if before is None:
            self._seconds[at] = seconds
        elif count < FIRST:
            self._seconds[at] = min(before, seconds)
        else:  # a hiccup is not the machine
            self._seconds[at] = before + (min(seconds, 1.5 * before) - before) / 8

    def upto(self, most: int) -> list[float]:
        """Of 0 .. most drafts; `plain` must be known."""
        known = sorted(self._seconds)
        found: list[float] = []
        for drafts in range(most + 1):
            above = bisect_left(known, drafts)
            if above < len(known) and known[above] == drafts:
                seconds = self._seconds[drafts]
            elif above < len(known):
                a, b = known[above - 1], known[above]
                share = (drafts - a) / (b - a)
                seconds = (1 - share) * self._seconds[a] + share * self._seconds[b]
            else:
                last = known[-1]
                rows = self._rows - 1
                factor = (1 + SLOPE * (rows + drafts)) / (1 + SLOPE * (rows + last))
                seconds = self._seconds[last] * factor
            found.append(max(seconds, found[-1]) if found else seconds)
        return found


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
            curve = self._curves[rows] = Curve(rows)
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
