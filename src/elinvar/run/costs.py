"""What steps that verify drafts cost, learned from those that were computed. Nothing here changes an answer."""

from __future__ import annotations

from collections import OrderedDict

SLOPE = 0.1
"""Of a step without drafts, what one more costs where nothing is measured."""
HOPED = 0.05
"""What is hoped for again where nothing was measured for long."""
MAX_CURVES = 64
RARE = 16
"""Steps with drafts in a row, after which one without is measured rarely."""
FIRST = 3
"""Measurements of which the least counts: shapes are recorded at their first use."""
LOOK = 64
"""Steps with drafts after which one without is measured again."""
NEAR, SHORT = 1.5, 256
"""Texts that are so many times as long have steps of their own cost; below SHORT tokens length matters little."""
QUICKER = 0.95
"""Of a step without drafts: one with them that takes less says that the other has become quicker."""
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

    __slots__ = ("_length", "_now", "_plain", "_shares", "_slope", "age")

    def __init__(self) -> None:
        self._plain: Mean | None = None
        self._shares: dict[int, Mean] = {}
        self._slope = SLOPE
        self._now = self._length = 0
        self.age = 0
        """Steps with drafts since the last one without."""

    @property
    def plain(self) -> float | None:
        """Without drafts."""
        return None if self._plain is None else self._plain.value

    def is_due(self, length: int) -> bool:
        """Whether a step without drafts is to be measured, with texts of so many tokens: else drafts would
        be held against one of another time, or of its first use."""
        if self._plain is None or not self._plain.is_settled or self.age >= LOOK:
            return True
        return not self._is_near(length)

    def _is_near(self, length: int) -> bool:
        short, long = sorted((max(length, SHORT), self._length))
        return long <= NEAR * short

    def book(self, drafts: int, seconds: float, length: int = 0) -> None:
        """Nothing is learned of drafts before a step without was seen."""
        self._now += 1
        if not drafts:
            if self._plain is None or not self._is_near(length):
                known, self._length = self._plain, max(length, SHORT)
                self._plain = Mean(seconds, self._now)
                if known is not None:  # its shape has been recorded
                    self._plain.count = known.count
            else:  # what is asked for rarely is believed at once
                self._plain.add(seconds, self._now, 0.5 if self.age >= RARE else 0.125)
            self.age = 0
            self._slope += (HOPED - self._slope) / OLD
            return
        self.age += 1
        if self._plain is None:
            return
        at, share = grid(drafts), seconds / self._plain.value
        if share < QUICKER:
            self.age = LOOK
        if at in self._shares:
            self._shares[at].add(share, self._now, 0.125)
        else:
            self._shares[at] = Mean(share, self._now)
        if (mean := self._shares[at]).is_settled:
            slope = min(max(0.0, mean.value - 1) / at, 1.0)
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
        plain, share = self._plain.value, 1.0
        found = [plain]
        for drafts, mean in sorted(self._shares.items()):
            # Not yet of a first time that was slower than steps like it.
            if not mean.is_settled and mean.value >= 1 + self._slope * drafts:
                continue
            if len(found) > most:
                break
            begin, share = share, max(share, mean.value)
            between = drafts + 1 - len(found)
            rise = (share - begin) / between
            found += [plain * (begin + rise * i) for i in range(1, between)]
            found.append(plain * share)
        beyond = range(1, most + 2 - len(found))
        found += [plain * (share + self._slope * i) for i in beyond]
        return found[: most + 1]


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
