"""How likely drafts are to be accepted: what drafters say of them, held against what came (csrc/chances.cpp).

Learned while serving, with short memories, from all that was proposed, verified or not: the tokens that came
tell. Nothing here changes an answer. Of a chain of eight drafts to ask and to learn takes 1 us each, 130 KB a
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
        self, behind: Behind, tokens: Sequence[int], said: Sequence[float], least: float = 0.0
    ) -> list[float]:
        """Of each draft of a chain: that it and those before it are accepted; as long as that is at
        least so likely."""
        return self._chances.of(*behind, tokens, said, least)

    def expected(self, row: int, count: int, at_first: float = 0.7) -> list[float]:
        """The same of a chain that is not made yet."""
        return self._chances.expected(row, count, at_first)

    def learn(
        self, behind: Behind, tokens: Sequence[int], said: Sequence[float], came: Sequence[int]
    ) -> None:
        """These tokens came; of drafts behind the first wrong one nothing is known."""
        self._chances.learn(*behind, tokens, said, came)

    def forget(self, row: int) -> None:
        self._chances.forget(row)
