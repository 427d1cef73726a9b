"""ProfiledOps: a provider whose calls are timed while `recording`, and are its own otherwise.

The inner provider computes, so answers do not change. Its bound methods stand in this object's
dictionary: when nothing is recorded a call costs what it costs without the wrapper. Steps that
were recorded for replay are timed as they run, op by op inside the one call that replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np

from elinvar.ops.api import F32, Ops
from elinvar.ops.cost import Cost
from elinvar.ops.costs import COSTS


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
        self._recording: Recording | None = None
        self._use(lambda op: getattr(self.inner, op))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """While the block runs every op call is recorded. Not to be nested."""
        recording = self._recording = Recording()
        self._use(lambda op: _timed(op, getattr(self.inner, op), recording))
        try:
            yield recording
        finally:
            self._recording = None
            self._use(lambda op: getattr(self.inner, op))

    def record(self, run: Callable[[], F32]) -> Callable[[], F32]:
        """As the inner provider's, with a look at which ops there are."""
        listed: list[_Listed] = []
        recording, self._recording = self._recording, None
        self._use(lambda op: _listing(op, getattr(self.inner, op), listed))
        try:
            replay = self.inner.record(run)
        finally:
            self._recording = recording
            self._use(
                lambda op: (
                    getattr(self.inner, op)
                    if recording is None
                    else _timed(op, getattr(self.inner, op), recording)
                )
            )
        timed = getattr(replay, "timed", None)

        def step() -> F32:
            if self._recording is None or timed is None:
                return replay()
            out, times = timed()
            end = perf_counter_ns()
            costs = _costs(listed)
            spans = zip(listed, times, times[1:], costs, strict=False)
            self._recording.calls += [OpCall(one.op, a, b, cost) for one, a, b, cost in spans]
            self._recording.overhead += perf_counter_ns() - end
            return out

        return step

    def _use(self, method: Callable[[str], Any]) -> None:
        for op in COSTS:
            if hasattr(self.inner, op):
                setattr(self, op, method(op))


def _timed(op: str, call: Callable[..., Any], recording: Recording) -> Callable[..., Any]:
    cost_of, keep = COSTS[op], recording.calls.append

    def timed(*arguments: Any, **switches: Any) -> Any:
        start = perf_counter_ns()
        result = call(*arguments, **switches)
        end = perf_counter_ns()
        # After the call and not before it: the pool's threads spin on, as they do between ops.
        keep(OpCall(op, start, end, cost_of(*arguments, **switches)))
        recording.overhead += perf_counter_ns() - end
        return result

    return timed


_BY_CONTENT = ("attention", "index_select", "sparse_attention", "moe")
"""Ops whose costs follow from positions and from routes, not from shapes alone."""


@dataclass(slots=True)
class _Listed:
    """A call of a recorded step."""

    op: str
    arguments: tuple[Any, ...]
    switches: dict[str, Any]
    cost: Cost | None
    """None: it follows from what the arguments hold at the time."""


def _listing(op: str, call: Callable[..., Any], listed: list[_Listed]) -> Callable[..., Any]:
    def listing(*arguments: Any, **switches: Any) -> Any:
        cost = None if op in _BY_CONTENT else COSTS[op](*arguments, **switches)
        # Activations are kept by shape: held, their memory could not serve the ops that follow.
        shapes = tuple(_shape_of(a) for a in arguments)
        named = {name: _shape_of(a) for name, a in switches.items()}
        listed.append(_Listed(op, shapes, named, cost))
        return call(*arguments, **switches)

    return listing


def _shape_of(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return np.broadcast_to(np.float32(0), value.shape)
    return value


def _costs(listed: list[_Listed]) -> list[Cost]:
    """Layers of one kind see the same positions: their attention costs the same."""
    attention: dict[Any, Cost] = {}
    costs = []
    for one in listed:
        cost = one.cost
        if cost is None and one.op != "attention":
            cost = COSTS[one.op](*one.arguments, **one.switches)
        if cost is None:
            q_THD, kv, *_, window = one.arguments
            switches = tuple(one.switches.get(name) for name in ("chunk", "softcap", "first"))
            kind = q_THD.shape, kv.k.shape[1:], kv.dtype, window, switches
            if kind not in attention:
                attention[kind] = COSTS[one.op](*one.arguments, **one.switches)
            cost = attention[kind]
        costs.append(cost)
    return costs
