"""Ahead: steps whose tokens are fetched when the next one has begun, so that a device never waits.

What the next step needs of them are ids to embed, and those it finds where it runs: until a token is
known, ~k in its place stands for what row k of that step sampled. Owns which steps may be left like that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elinvar.base.batch import I32
from elinvar.base.plan import RowStart, StepOutput
from elinvar.ops.api import F32, Coming, Ops
from elinvar.ops.arguments import SampleResult
from elinvar.run.rows import Rows


@dataclass(slots=True)
class Begun:
    """A step on its way."""

    finish: Callable[[], StepOutput]
    """Waits for it; to be called once."""
    is_open: bool = False
    """A plan ahead may begin before that."""


class Ahead:
    """Without `ops` that sample ahead no step is left open."""

    def __init__(self, ops: Ops, rows: Rows) -> None:
        self._sample = getattr(ops, "sample_ahead", None)
        self._rows = rows
        self._tied: set[int] = set()
        """Rows of which the host must know each token before the next is sampled."""
        self._last_s = self._entered_s = 0.0
        """When the last step was fetched, and when the host came back to it afterwards."""
        self._was_late = False

    def start(self, started: RowStart) -> None:
        """The row is this request's from now on, and `rows` knows it."""
        params, edits = started.params, self._rows.edits.get(started.row)
        sees_part = params.attention_window is not None or params.attention_budget is not None
        counts = edits is not None and edits.reads_tokens
        is_tied = sees_part or counts or params.grammar is not None or params.thinking is not None
        (self._tied.add if is_tied else self._tied.discard)(started.row)

    def takes(self, rows_L: list[int]) -> bool:
        """A step in which these rows decode may be left open."""
        return self._sample is not None and self._tied.isdisjoint(rows_L)

    def sample(self, logits_LV: F32, rows_L: list[int], position_L: I32) -> Coming:
        assert self._sample is not None
        coming: Coming = self._sample(logits_LV, self._rows.sample_args(rows_L, position_L))
        self._rows.token_ids[rows_L, position_L] = ~np.arange(len(rows_L), dtype=np.int32)
        return coming

    def enter(self) -> None:
        """The host is back at a step that is under way."""
        self._entered_s = time.perf_counter()

    def fetch(self, coming: Coming) -> tuple[SampleResult, float | None]:
        """Its result, and the seconds since that of the step before: as the device was waited for both
        times, or as the host was busy with steps meanwhile. Otherwise they say nothing, and are None."""
        is_late, was_late, before = coming.is_there, self._was_late, self._last_s
        result = coming.result()
        now = self._last_s = time.perf_counter()
        self._was_late = is_late
        busy = now - self._entered_s > self._entered_s - before
        return result, now - before if (busy if is_late else not was_late) else None
