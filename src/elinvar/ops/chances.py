"""How likely drafts are to be accepted: what drafters say of them, held against what came (csrc/chances.cpp).

Learned while serving, with short memories, from all that was proposed, verified or not: the tokens that came
tell. Nothing here changes an answer. Of a chain of eight drafts to ask and to learn takes 1 us each, 0.4 MB a
drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from elinvar import _cpu


class Behind(NamedTuple):
    """What a chain of drafts follows."""

    row: int
    space: int
    """A hash of whose text it is: what came of drafts of a token is known of one's own."""
    token: int


class Chances:
    """Of one drafter."""

    def __init__(self) -> None:
        self._chances = _cpu.Chances()

    def of(
        self,
        behind: Sequence[Behind],
        tokens: Sequence[Sequence[int]],
        said: Sequence[Sequence[float]],
        least: float = 0.0,
    ) -> list[list[float]]:
        """Of each draft of each chain: that it and those before it are accepted; as long as that is at
        least so likely."""
        return self._chances.of(behind, tokens, said, least)

    def expected(self, row: int, count: int, at_first: float = 0.7) -> list[float]:
        """The same of a chain that is not made yet."""
        return self._chances.expected(row, count, at_first)

    def learn(
        self,
        behind: Sequence[Behind],
        tokens: Sequence[Sequence[int]],
        said: Sequence[Sequence[float]],
        came: Sequence[Sequence[int]],
    ) -> None:
        """These tokens came; of drafts behind the first wrong one nothing is known."""
        self._chances.learn(behind, tokens, said, came)

    def forget(self, row: int) -> None:
        self._chances.forget(row)


def best_counts(
    chances: Sequence[Sequence[float]],
    seconds: Sequence[float],
    rows: int,
    margin: float,
    slow_down: float,
) -> list[int]:
    """How many drafts of each chain to verify: the likeliest ones, as many as bring the most tokens a
    second. seconds: of a step of so many rows with 0, 1, 2, ... drafts. margin: what they must promise, in
    times what a step without promises; slow_down: of the best number so far, when more of them promise
    less than that, no one is looked for."""
    return _cpu.best_counts(chances, seconds, rows, margin, slow_down)
