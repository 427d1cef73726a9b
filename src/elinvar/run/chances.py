"""What drafts are worth: how likely each is to be accepted, and what steps that verify them cost.

Learned while serving, with short memories. Nothing here changes an answer.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise

BOUNDS = 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98
"""Of what drafters say: what lies between two is held against what came of the like. Finer where a little
decides about a long chain."""
PRIOR, PRIOR_ROW = 4.0, 8.0
"""Verified drafts that an expectation is worth; beside those of a row."""
FADE = 0.98
"""Of what was counted before, at each draft of a drafter."""
FADE_ROW = 0.9
"""The same at each step of a row: it may come to another kind of text."""
POSITIONS = 4
"""That a row counts apart: the first ones, and all behind them."""
FAR = 0.25
"""Of a draft, what one of the last kind counts: they come and fail together."""


class _Counts:
    __slots__ = ("hits", "trials")

    def __init__(self) -> None:
        self.hits = self.trials = 0.0

    def add(self, hit: bool, fade: float, weight: float = 1.0) -> None:
        self.hits = fade * self.hits + weight * hit
        self.trials = fade * self.trials + weight

    def beside(self, expected: float, prior: float = PRIOR) -> float:
        return (prior * expected + self.hits) / (prior + self.trials)


class Chances:
    """Of one drafter. What it says of a draft is held against what came of such drafts, and that against
    what came of those of the same row at the same place of a chain."""

    def __init__(self) -> None:
        self._said = [_Counts() for _ in range(len(BOUNDS) + 1)]
        self._places = [_Counts() for _ in range(POSITIONS)]
        self._rows: dict[int, list[_Counts]] = {}

    def of(self, row: int, said: Sequence[float], least: float = 0.0) -> list[float]:
        """Of each draft of a chain: that it and those before it are accepted; as long as that is at
        least so likely."""
        own = self._rows.get(row)
        chance, chances = 1.0, list[float]()
        for place, value in enumerate(said):
            value = _chance(value)
            expected = self._said[bisect(BOUNDS, value)].beside(value)
            if own is not None:
                expected = own[min(place, POSITIONS - 1)].beside(expected, PRIOR_ROW)
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
                expected = own[at].beside(expected, PRIOR_ROW)
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
            self._said[bisect(BOUNDS, _chance(value))].add(hit, FADE)
            self._places[at].add(hit, FADE)
            own[at].add(hit, 1.0, FAR if at == POSITIONS - 1 else 1.0)

    def forget(self, row: int) -> None:
        self._rows.pop(row, None)


def _chance(said: float) -> float:
    """Also of what is no number."""
    return min(max(0.0, said), 1.0)


SLOPE = 0.1
"""Where nothing is measured, a further draft costs so much of a step without."""
MAX_CURVES = 64
RARE = 16
"""Steps with drafts in a row, after which one without is measured rarely."""
FIRST = 3
"""Measurements of which the least counts: shapes are recorded at their first use."""
OLD = 256
"""Steps after which a measurement of drafts is forgotten. A number of drafts that seemed too slow is not chosen,
hence not measured, until then."""


class Mean:
    """Of what was measured lately."""

    __slots__ = ("at", "count", "value")

    def __init__(self, value: float, at: int) -> None:
        self.value, self.count = value, 1
        self.at = at
        """The step that measured it last."""

    @property
    def is_settled(self) -> bool:
        return self.count >= FIRST

    def add(self, value: float, at: int, weight: float) -> None:
        self.count, self.at = self.count + 1, at
        if self.count <= FIRST:
            self.value = min(self.value, value)
        else:  # a hiccup is not the machine
            self.value += (min(value, 1.5 * self.value) - self.value) * weight


class Curve:
    """Seconds of steps in which so many rows decode, by the number of drafts that are verified. Kept as
    shares of those without: what else slows a machine down slows down both."""

    __slots__ = ("_now", "_plain", "_shares", "_slope", "age")

    def __init__(self) -> None:
        self._plain: Mean | None = None
        self._shares: dict[int, Mean] = {}
        self._slope = SLOPE
        self._now = 0
        self.age = 0
        """Steps with drafts since the last one without."""

    @property
    def plain(self) -> float | None:
        """Without drafts."""
        return None if self._plain is None else self._plain.value

    def book(self, drafts: int, seconds: float) -> None:
        """Nothing is learned of drafts before a step without was seen."""
        self._now += 1
        if not drafts:
            if self._plain is None:
                self._plain = Mean(seconds, self._now)
            else:  # what is asked for rarely is believed at once
                self._plain.add(seconds, self._now, 0.5 if self.age >= RARE else 0.125)
            self.age = 0
            return
        self.age += 1
        if self._plain is None:
            return
        at, share = grid(drafts), seconds / self._plain.value
        if at in self._shares:
            self._shares[at].add(share, self._now, 0.125)
        else:
            self._shares[at] = Mean(share, self._now)
        slope = min(max(0.0, share - 1) / drafts, 1.0)
        self._slope += (slope - self._slope) / 8

    def least(self, rows: int) -> float:
        """Drafts that are less likely than this to be accepted are not worth their place in any step: a
        quarter of the chance at which one of usual price pays, as some come cheaper."""
        return min(rows * self._slope, 2.0) / 4

    def upto(self, most: int) -> list[float]:
        """Of 0 .. most drafts; `plain` must be known."""
        assert self._plain is not None
        for drafts in [d for d, mean in self._shares.items() if self._now - mean.at > OLD]:
            del self._shares[drafts]
        shares = {0: 1.0} | {
            drafts: mean.value
            for drafts, mean in self._shares.items()
            # Not yet of a first time that was slower than steps like it.
            if mean.is_settled or mean.value < 1 + self._slope * drafts
        }
        known = sorted(shares)
        found: list[float] = []
        for low, high in pairwise([*known, max(most, known[-1]) + 1]):
            begin, rise = shares[low], self._slope
            if high in shares:
                rise = (shares[high] - begin) / (high - low)
            found += [begin + rise * i for i in range(high - low)]
        plain = self._plain.value
        return [plain * share for share in accumulate(found[: most + 1], max)]


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
CREDIT_TO_FOLLOW = 16.0
"""The same of one that reads states: prompts come before drafts."""
SAVED = 4.0
"""Times its credit that it may lose of what it gained: a wrong chain of each of some rows takes a credit."""


class Account:
    """What a drafter has cost and gained, in seconds. One that is empty is not asked until the time it
    may lose has come together again: so whatever it does, it costs a set share at most."""

    __slots__ = ("_balance", "_credit", "_most")

    def __init__(self, credit: float = CREDIT) -> None:
        """credit: in steps."""
        self._credit, self._balance = credit, 0.0
        self._most: float | None = None
        """Seconds of the credit: unknown until a step went by."""

    @property
    def is_open(self) -> bool:
        return self._most is None or self._balance > 0

    @property
    def can_begin(self) -> bool:
        """Something that costs now and may gain later: there is enough to see it through."""
        return self._balance >= (0.0 if self._most is None else self._most / 2)

    def pass_by(self, seconds: float, plain: float | None = None) -> None:
        """A step went by; plain: seconds of one without drafts, None: it was another kind of step."""
        if plain is not None:
            if self._most is None:
                self._balance += self._credit * plain
            self._most = self._credit * plain
        allowed = self._balance + ALLOWANCE * seconds
        if self._most is not None:
            allowed = min(allowed, self._most)
            self._balance = min(self._balance, SAVED * self._most)
        self._balance = max(self._balance, allowed)

    def book(self, gained: float) -> None:
        """Below 0: lost."""
        self._balance += gained
