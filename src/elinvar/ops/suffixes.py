"""Where what a text ends with has occurred before, and what followed there: csrc/suffixes.cpp.

A token has some 50 bytes, 30 to 80: itself, and for each of three lengths of grams a link and its part of a
table. To add one takes 0.15 us, to ask 0.5 to 1.5 us.
"""

from __future__ import annotations

from collections.abc import Sequence

from elinvar import _cpu
from elinvar.ops.api import I32


class Suffixes:
    """Texts of rows, and per namespace a corpus of texts that ended lately."""

    def __init__(
        self, token_ids_RC: I32, most_kept: int, most_shared: int, most_running: int
    ) -> None:
        """token_ids_RC: each row's text, which others write. Bounds in tokens: of all corpora, where the
        one that was asked least recently goes; of one, whose older half goes; of the rows' texts, of which
        those that come when it is reached are not looked into."""
        self._index = _cpu.Suffixes(token_ids_RC, most_kept, most_shared, most_running)

    def begin(self, row: int, namespace: bytes) -> None:
        """The row's text is another from now on."""
        self._index.begin(row, namespace)

    def propose(
        self, asks: Sequence[tuple[int, int, int]], least: float = 0.0, ahead: Sequence[int] = ()
    ) -> list[tuple[list[int], list[float]]]:
        """asks: rows, how many of their first tokens are known, and how many are wanted at most. Of each
        what followed the longest matches with the end of these tokens, and of `ahead` after them: the tokens,
        and of each how likely it comes if those before it do, as long as the whole is at least so likely."""
        return self._index.propose(asks, least, ahead)

    def forget(self, row: int, start: int, stop: int) -> None:
        """The row's text has ended. Its tokens at start .. stop - 1 are for its namespace."""
        self._index.forget(row, start, stop)

    @property
    def num_kept(self) -> int:
        """Tokens in corpora."""
        return self._index.num_kept()

    @property
    def num_running(self) -> int:
        """Tokens of rows."""
        return self._index.num_running()

    @property
    def bytes(self) -> int:
        return self._index.bytes()
