"""ProfiledOps: a provider whose calls are timed while `recording`, and are its own otherwise.

The inner provider computes, so answers do not change. Its bound methods stand in this object's
dictionary: when nothing is recorded a call costs what it costs without the wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from elinvar.ops.api import Ops
from elinvar.ops.cost import COSTS, Cost


@dataclass(frozen=True, slots=True)
class OpCall:
    op: str
    start: int
    """ns, of the clock perf_counter_ns."""
    end: int
    cost: Cost


class Recording:
    """The calls of one stretch of work, and what recording them took of its time."""

    def __init__(self) -> None:
        self.calls: list[OpCall] = []
        self.overhead = 0
        """ns between the calls that the recorder itself spent."""


class ProfiledOps:
    def __init__(self, inner: Ops) -> None:
        self.inner = inner
        self._use(lambda op: getattr(inner, op))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """While the block runs every op call is recorded. Not to be nested."""
        recording = Recording()
        self._use(lambda op: _timed(op, getattr(self.inner, op), recording))
        try:
            yield recording
        finally:
            self._use(lambda op: getattr(self.inner, op))

    def _use(self, method: Callable[[str], Any]) -> None:
        for op in COSTS:
            setattr(self, op, method(op))


def _timed(op: str, call: Callable[..., Any], recording: Recording) -> Callable[..., Any]:
    cost_of, keep = COSTS[op], recording.calls.append

    def timed(*arguments: Any, **named: Any) -> Any:
        start = perf_counter_ns()
        result = call(*arguments, **named)
        end = perf_counter_ns()
        # After the call and not before it: the pool's threads spin on, as they do between ops.
        keep(OpCall(op, start, end, cost_of(*arguments, **named)))
        recording.overhead += perf_counter_ns() - end
        return result

    return timed
