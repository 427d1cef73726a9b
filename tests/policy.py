"""Speculation's policy on answers that are known, in steps that cost what they are said to: what it gains
then depends on no machine."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from elinvar.base.plan import PlanItem, RowStart, StepOutput
from elinvar.base.sampling import SamplingParams
from elinvar.run import sources, speculation
from elinvar.run.drafters.api import Drafter
from elinvar.run.rows import Rows
from elinvar.run.speculation import Speculator

Told = tuple[Sequence[int], Sequence[int]]
"""A prompt and its answer."""
Cost = Callable[[int, int], float]
"""Seconds of a step by its rows and drafts."""
ROOM, MAX_ROWS, MAX_CONTEXT, VOCAB = 16, 8, 4096, 1 << 20


def line(share: float, rows: int = MAX_ROWS) -> Cost:
    """A token more costs this share of a step of so many rows without drafts, a row or a draft."""
    return lambda here, drafts: 1 + share * (here - rows + drafts)


class Words:
    """Texts as tokens: a word or a sign each."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in re.findall(r"\w+|\W", text)]


class Replay:
    """A server that answers what it is told to; what it learns it keeps."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        drafters: Callable[[Rows], list[Drafter]],
        cost: Cost,
        clock: Any,
    ) -> None:
        """clock: which drafters are timed by."""
        # Salted, two runs would share places of the table otherwise, and differ by some per cent.
        monkeypatch.setattr(speculation, "hash", zlib.crc32, raising=False)
        monkeypatch.setattr(speculation, "time", clock)
        monkeypatch.setattr(sources, "time", clock)
        self._cost, self._clock = cost, clock
        self._rows = Rows(MAX_ROWS, MAX_CONTEXT, ())
        self._speculator = Speculator(self._rows, None, drafters(self._rows), VOCAB)

    def gain(self, told: Sequence[Told], space: bytes = b"") -> float:
        """Of answers that begin together, decode alone: seconds without drafts over seconds with them."""
        known = [len(prompt) + 1 for prompt, _ in told]
        whole = [[*prompt, *answer] for prompt, answer in told]
        for row, (prompt, _) in enumerate(told):
            params = SamplingParams(seed=0)
            started = RowStart(
                "", row, whole[row][: known[row]], params, [], -1, len(prompt), frozenset(), space
            )
            self._rows.start(started)
            self._speculator.start(started)
        took, live = 0.0, list(range(len(told)))
        while live:
            took += self._step(live, known, whole)
            self._speculator.forget([row for row in live if known[row] == len(whole[row])])
            live = [row for row in live if known[row] < len(whole[row])]
        longest = max(len(answer) for _, answer in told)
        plain = [sum(len(answer) > at for _, answer in told) for at in range(1, longest)]
        return sum(self._cost(rows, 0) for rows in plain) / took

    def _step(self, live: list[int], known: list[int], whole: list[list[int]]) -> float:
        items = [
            PlanItem(
                "", row, known[row] - 1, 1, True, [], min(ROOM, len(whole[row]) - known[row] - 1)
            )
            for row in live
        ]
        began, sampled = self._clock.perf_counter(), []
        planned = self._speculator.draft(items)
        for row, item in zip(live, planned, strict=True):
            ids, at = self._rows.token_ids[row], known[row]
            right = 0
            while right < item.num_drafts and ids[at + right] == whole[row][at + right]:
                right += 1
            sampled.append(whole[row][at : at + right + 1])
            known[row] += right + 1
            ids[at : known[row]] = sampled[-1]
        self._speculator.observe(planned, cast(Any, None), sampled, None)
        computed = self._cost(len(live), sum(item.num_drafts for item in planned))
        thought = self._clock.perf_counter() - began
        output = StepOutput(sampled, [[] for _ in sampled])
        self._speculator.book(planned, output, computed + thought)
        return computed + self._clock.perf_counter() - began
