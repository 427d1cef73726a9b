"""Drafters for tests, a policy that verifies whatever they say, and a clock for what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import pytest

from elinvar.run import accounts, costs, speculation
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.rows import Rows


def verify_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost nothing, any chance is worth one, and nobody runs out of credit."""
    monkeypatch.setattr(speculation, "MARGIN", 1.0)
    monkeypatch.setattr(costs.Curve, "upto", lambda self, most: [1.0] * (most + 1))
    monkeypatch.setattr(costs.Curve, "least", lambda self, rows: 0.0)
    monkeypatch.setattr(costs.Curve, "is_due", lambda self, length: self.plain is None)
    monkeypatch.setattr(accounts.Account, "is_open", True)
    monkeypatch.setattr(accounts.Account, "can_begin", True)


class Clock:
    """Each look at it is so many seconds after the one before."""

    def __init__(self, seconds: float) -> None:
        self._times: Iterator[float] = count(0.0, seconds)

    def perf_counter(self) -> float:
        return next(self._times)


class Oracle:
    """Knows sequences that will come, and is wrong at each index that `errs` says."""

    name = "oracle"
    reads_hidden = False

    def __init__(
        self,
        rows: Rows,
        sequences: Sequence[Sequence[int]],
        errs: Callable[[int], bool] = lambda index: False,
        is_instant: bool = True,
    ) -> None:
        self._rows, self._sequences, self._errs = rows, [list(s) for s in sequences], errs
        self.is_instant = is_instant

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._guess(ask) for ask in asks]

    def _guess(self, ask: Ask) -> Guess:
        known = self._rows.token_ids[ask.row, : ask.num_tokens].tolist()
        for sequence in self._sequences:
            if sequence[: len(known)] == known:
                tokens = sequence[len(known) : len(known) + ask.most]
                for i, token in enumerate(tokens):
                    if self._errs(len(known) + i):
                        tokens[i] = (token + 1) % 256
                return Guess(tokens, [0.9] * len(tokens))
        return Guess()

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        pass
