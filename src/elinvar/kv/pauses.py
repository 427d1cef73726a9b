"""Pauses: what the past of a class of sessions says of those that have not come back yet.

Per class and bin of age, four to a factor of two: how many came back, and how many seconds were waited in
it, by those who came back and by those who have not. Their quotient is the hazard of coming back (Nelson,
1969), right for histories that are cut off, so whoever ends in silence counts. From hazards follows the
index of what to keep (Gittins, 1979; Beckmann, Chen and Cidon, 2018). The rule and what it was
compared with: docs/design/024-agents-as-a-load.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

_FIRST = 0.05
_PER_OCTAVE = 4
_NUM_BINS = 80
_EDGES = [0.0, *(_FIRST * 2 ** (i / _PER_OCTAVE) for i in range(_NUM_BINS))]
"""Ages at which bins begin; the last one, of half a day, has no end."""
_WIDTHS = [b - a for a, b in pairwise(_EDGES)]

_MEMORY = 8192
"""Pauses after which older ones count half."""
_MAX_CLASSES = 1024
_LEAST_UNIT = 1e-3


class History:
    """Of one class."""

    __slots__ = ("index", "learnt", "num_ended", "returns", "waited")

    def __init__(self) -> None:
        self.returns = [0.0] * _NUM_BINS
        self.waited = [0.0] * _NUM_BINS
        self.num_ended = 0
        self.learnt = -1
        """`num_ended` when `index` was made."""
        self.index: list[float] = []
        """By bin: the best ratio, over all horizons, of the chance to come back until then to the
        expected seconds of waiting."""

    @property
    def is_old(self) -> bool:
        return self.learnt < 0 or self.num_ended > 1.05 * self.learnt + 1

    def fade(self) -> None:
        self.returns = [value / 2 for value in self.returns]
        self.waited = [value / 2 for value in self.waited]
        self.num_ended //= 2
        self.learnt //= 2


@dataclass(slots=True, eq=False)
class Pause:
    """One that has not ended."""

    histories: tuple[History, History]
    """Its class's, and everybody's."""
    since: float
    unit: float
    """Seconds in which its age is measured."""
    bin: int = 0
    """Up to this one its waiting is booked."""

    @property
    def bin_ends(self) -> float:
        """When its worth changes."""
        last = self.bin == _NUM_BINS - 1
        return math.inf if last else self.since + self.unit * _EDGES[self.bin + 1]


@dataclass(slots=True)
class Pauses:
    _classes: dict[tuple[str, str, bool], History] = field(default_factory=dict)
    _everybody: tuple[History, History] = field(default_factory=lambda: (History(), History()))
    """Those of whom nothing is known, and those whose clients said when they come back."""

    def begin(self, tenant: str, kind: str, now: float, expected: float | None) -> Pause:
        """kind: what the session waits for, where the client says. expected: seconds, as far as the
        client knows: not believed, but taken as a unit, so that what is learned is how right such
        clients are."""
        told = expected is not None
        everybody = self._everybody[told]
        key = tenant, kind, told
        history = self._classes.get(key)
        if history is None and len(self._classes) < _MAX_CLASSES:
            history = self._classes[key] = History()
        unit = 1.0 if expected is None else max(expected, _LEAST_UNIT)
        return Pause((history or everybody, everybody), now, unit)

    def look(self, pause: Pause, now: float) -> None:
        """Book the bins that it has left behind."""
        while pause.bin_ends <= now:
            for history in _each(pause):
                history.waited[pause.bin] += _WIDTHS[pause.bin]
            pause.bin += 1

    def end(self, pause: Pause, now: float, came_back: bool) -> None:
        self.look(pause, now)
        rest = max(0.0, (now - pause.since) / pause.unit - _EDGES[pause.bin])
        for history in _each(pause):
            history.waited[pause.bin] += rest
            history.returns[pause.bin] += came_back
            history.num_ended += 1
            if history.num_ended > 2 * _MEMORY:
                history.fade()

    def worth(self, pause: Pause) -> float:
        """Of keeping what it comes back to, a second of waiting: the lowest yields first."""
        history, everybody = pause.histories
        if history.is_old:
            history.index = _index(history, everybody)
            history.learnt = history.num_ended
        return history.index[pause.bin] / pause.unit

    def expected_s(self, pause: Pause) -> float:
        """Seconds from its beginning until it comes back, as the median of those as old as it is."""
        history, everybody = pause.histories
        here = 1.0
        for index in range(pause.bin, _NUM_BINS - 1):
            here *= math.exp(-_hazard(history, everybody, index) * _WIDTHS[index])
            if here < 0.5:
                return pause.unit * _EDGES[index + 1]
        return math.inf


def _each(pause: Pause) -> tuple[History, ...]:
    mine, everybody = pause.histories
    return (mine,) if mine is everybody else (mine, everybody)


def _hazard(history: History, everybody: History, index: int) -> float:
    """Returns a second. A class without a past is as everybody; without any past a tenth of those
    who wait return in each bin, so the longer somebody is away the longer he stays."""
    width = _WIDTHS[index]
    rate = (everybody.returns[index] + 0.1) / (everybody.waited[index] + width)
    return (history.returns[index] + rate * width) / (history.waited[index] + width)


def _index(history: History, everybody: History) -> list[float]:
    """From the last bin to the first: a bin's best horizon goes on through the next ones as long as
    theirs have a better ratio than its own."""
    out = [0.0] * _NUM_BINS
    runs: list[tuple[float, float, float]] = []
    for index in range(_NUM_BINS - 1, -1, -1):
        hazard = _hazard(history, everybody, index)
        stays = math.exp(-hazard * _WIDTHS[index])
        chance = 1 - stays
        seconds = chance / hazard
        while runs and runs[-1][0] * seconds > chance * runs[-1][1]:
            more_chance, more_seconds, more_stays = runs.pop()
            chance += stays * more_chance
            seconds += stays * more_seconds
            stays *= more_stays
        runs.append((chance, seconds, stays))
        out[index] = chance / seconds
    return out
