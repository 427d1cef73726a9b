"""Drafters that do harm where they can. None may change an answer, end a request or cost much time. Where
they are made in another process this module is imported there."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.heads import num_computed
from elinvar.run.rows import Rows


class Adversary:
    is_instant = True
    reads_hidden = False

    def __init__(self, rows: Rows) -> None:
        self.rows, self.name = rows, type(self).__name__

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self.guess(ask) for ask in asks]

    def guess(self, ask: Ask) -> Guess:
        raise NotImplementedError

    def observe(self, seen: Seen) -> None: ...

    def forget(self, row: int) -> None: ...


class AlwaysWrong(Adversary):
    """As much as it may say, and sure of it. The token differs from step to step, so that it is right now
    and then by chance alone."""

    def guess(self, ask: Ask) -> Guess:
        tokens = [(7919 * (ask.num_tokens + i) + 13) % 256 for i in range(ask.most)]
        return Guess(tokens, [1.0] * ask.most)


class Slow(AlwaysWrong):
    """And it takes its time: it is asked only where it promises something."""

    is_instant = False


class Reader(Slow):
    """And reads states, of each token of the rows that it follows once and in order."""

    reads_hidden = True

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.num_seen = 0
        self._until: dict[int, int] = {}

    def observe(self, seen: Seen) -> None:
        assert seen.hidden is not None
        for item, sampled, first in zip(seen.items, seen.sampled, seen.firsts, strict=True):
            assert first + item.num_tokens <= len(seen.hidden)
            assert self._until.get(item.row, item.start) == item.start
            self._until[item.row] = item.start + num_computed(item, sampled)
            self.num_seen += item.num_tokens

    def forget(self, row: int) -> None:
        self._until.pop(row, None)


class Raises(Adversary):
    """At the second proposal, when it is trusted."""

    count = 0

    def guess(self, ask: Ask) -> Guess:
        self.count += 1
        if self.count > 1:
            raise RuntimeError("a drafter's own fault")
        return Guess([1] * ask.most, [0.5] * ask.most)


class RaisesElsewhere(AlwaysWrong):
    def observe(self, seen: Seen) -> None:
        raise ValueError("it cannot look")

    def forget(self, row: int) -> None:
        raise KeyError(row)


class NoTokens(Adversary):
    """Ids that no vocabulary has, among some that it has."""

    def guess(self, ask: Ask) -> Guess:
        ids = [1, -1, 2**31 - 1, -(2**31), 2**40, 300, 5]
        tokens = [ids[(ask.num_tokens + i) % len(ids)] for i in range(ask.most)]
        return Guess(tokens, [0.9] * ask.most)


class TooLong(Adversary):
    """More than was asked for."""

    def guess(self, ask: Ask) -> Guess:
        return Guess([3] * (ask.most + 50), [0.9] * (ask.most + 50))


class Uneven(Adversary):
    """Chances for some of its tokens."""

    def guess(self, ask: Ask) -> Guess:
        return Guess([3] * ask.most, [0.9] * (ask.most // 2))


class WrongCount(Adversary):
    """A guess more than there are rows."""

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [Guess([1], [0.5])] * (len(asks) + 1)

    def guess(self, ask: Ask) -> Guess: ...


class NoNumbers(Adversary):
    """Chances that are none."""

    def guess(self, ask: Ask) -> Guess:
        chances = [math.nan, math.inf, -math.inf, -1.0, 5.0]
        picked = [chances[(ask.num_tokens + i) % 5] for i in range(ask.most)]
        return Guess([3] * ask.most, picked)


class NoGuesses(Adversary):
    """Something else altogether."""

    def propose(self, asks: Sequence[Ask]) -> Any:
        return None

    def guess(self, ask: Ask) -> Guess: ...


class Scribbler(AlwaysWrong):
    """Writes behind the known tokens of its rows, as it may."""

    def guess(self, ask: Ask) -> Guess:
        self.rows.token_ids[ask.row, ask.num_tokens : ask.num_tokens + ask.most] = 9
        return super().guess(ask)


ADVERSARIES: tuple[Callable[[Rows], Adversary], ...] = (
    *(AlwaysWrong, Slow, Reader, Raises, RaisesElsewhere, NoTokens, TooLong, Uneven, WrongCount),
    *(NoNumbers, NoGuesses, Scribbler),
)
"""For the engine's own thread."""


class Hangs(Adversary):
    def guess(self, ask: Ask) -> Guess:
        threading.Event().wait()
        raise AssertionError


class Crashes(Adversary):
    """Without a word."""

    def guess(self, ask: Ask) -> Guess:
        os._exit(3)


def never_made(rows: Rows) -> Adversary:
    """It cannot be loaded."""
    raise FileNotFoundError("there is no such draft model")


def hangs_at_once(rows: Rows) -> Adversary:
    """It loads for ever."""
    threading.Event().wait()
    raise AssertionError


HANGING = Hangs, Crashes, never_made, hangs_at_once
"""For run.drafters.aside, in a process of their own: Aside(rows, Hangs)."""
