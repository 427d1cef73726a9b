"""Steps of an engine, timed op by op: run (Mix), summed up (Phase), and as a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

from elinvar.base.handling import OFFLINE
from elinvar.base.sampling import SamplingParams
from elinvar.cli.bench.arguments import spread_prompt
from elinvar.cli.ceilings import shares
from elinvar.engine.core import Engine
from elinvar.ops.ceilings import Ceilings
from elinvar.ops.profiled import OpCall, ProfiledOps


@dataclass(frozen=True, slots=True)
class Pass:
    """One prompt, or one decode step: what it took in ns of perf_counter_ns, and its op calls."""

    start: int
    end: int
    calls: list[OpCall]
    overhead: int

    @property
    def seconds(self) -> float:
        """Without what the recorder took."""
        return (self.end - self.start - self.overhead) / 1e9

    @property
    def kernel_seconds(self) -> float:
        return sum(call.end - call.start for call in self.calls) / 1e9


@dataclass
class Phase:
    name: str
    tokens: int
    """Of one pass."""
    passes: list[Pass] = field(default_factory=list)

    def as_json(self, roof: Ceilings) -> dict[str, Any]:
        """Means over the quicker half of the passes: what disturbs a machine only makes it slower,
        and shares of means add up. Ops by the time they take, the longest first."""
        passes = sorted(self.passes, key=lambda p: p.seconds)[: (len(self.passes) + 1) // 2]
        count = len(passes)
        seconds = sum(p.seconds for p in passes) / count
        python = seconds - sum(p.kernel_seconds for p in passes) / count
        by_op: dict[tuple[str, str], list[OpCall]] = defaultdict(list)
        for one in passes:
            for call in one.calls:
                by_op[call.op, call.cost.label].append(call)
        streamed = sum(c.cost.streamed for calls in by_op.values() for c in calls) / count
        cached = streamed < roof.cache_bytes
        ops = [_row(calls, count, roof, cached) for calls in by_op.values()]
        return {
            "name": self.name,
            "passes": len(self.passes),
            "seconds": seconds,
            "seconds_range": [f(p.seconds for p in self.passes) for f in (min, max)],
            "tokens_per_s": self.tokens / seconds,
            "python_seconds": python,
            "python_share": python / seconds,
            "ops": [
                {**row, "share": row["seconds"] / seconds}
                for row in sorted(ops, key=lambda row: -row["seconds"])
            ],
        }


def _row(calls: Sequence[OpCall], passes: int, roof: Ceilings, cached: bool) -> dict[str, Any]:
    """One line of the roofline from all calls of one kind."""
    seconds = sum(call.end - call.start for call in calls) / 1e9
    streamed, moved, ops = (
        sum(getattr(call.cost, what) for call in calls) / seconds
        for what in ("streamed", "moved", "ops")
    )
    one = calls[0]
    return {
        "op": one.op,
        "label": one.cost.label,
        "calls": len(calls) / passes,
        "seconds": seconds / passes,
        "gb_per_s": moved / 1e9,
        "gop_per_s": ops / 1e9,
        "percent": shares(streamed, moved, ops, one.cost.unit, roof, cached),
    }


class Mix:
    """The engine's real steps, timed through its profiled ops."""

    def __init__(self, engine: Engine, ops: ProfiledOps) -> None:
        self.engine, self.ops = engine, ops

    def check(self, prefills: Sequence[int], prompt_tokens: int) -> None:
        """Raises InputError where the model's context is too short for what is asked."""
        for length in [*prefills, prompt_tokens]:
            self.engine.check(spread_prompt(self.engine, 0, length), SamplingParams(max_tokens=1))

    def prefill(self, length: int, repeats: int) -> Phase:
        phase = Phase(f"prefill {length}", length)
        for i in range(repeats + 1):
            self.engine.add(
                spread_prompt(self.engine, i, length),
                SamplingParams(max_tokens=1, temperature=0),
                handling=OFFLINE,
            )
            done = self._pass()
            if i:  # the first one warms up
                phase.passes.append(done)
        return phase

    def decode(self, size: int, prompt_tokens: int, steps: int) -> Phase:
        """Steps in which every row decodes."""
        engine, phase = self.engine, Phase(f"decode, batch {size}", size)
        params = SamplingParams(max_tokens=2**20, temperature=0, ignore_eos=True)
        ids = [
            engine.add(spread_prompt(self.engine, i, prompt_tokens), params, handling=OFFLINE)
            for i in range(size)
        ]
        begun: set[str] = set()
        while len(begun) < size:
            begun |= {delta.request_id for delta in engine.step() if delta.token_ids}
        for i in range(steps + 2):
            done = self._pass(one_step=True)
            if i > 1:  # the first records the step, the second is its first replay
                phase.passes.append(done)
        for request_id in ids:
            engine.abort(request_id)
        engine.step()
        return phase

    def _pass(self, one_step: bool = False) -> Pass:
        with self.ops.recording() as recording:
            start = perf_counter_ns()
            self.engine.step()
            while self.engine.has_work and not one_step:
                self.engine.step()
            end = perf_counter_ns()
        return Pass(start, end, recording.calls, recording.overhead)


def chrome_trace(phases: Sequence[Phase]) -> dict[str, Any]:
    """The passes and the ops in them, in the Trace Event Format that Perfetto reads."""
    first = min((p.start for phase in phases for p in phase.passes), default=0)

    def event(name: str, start: int, end: int, **args: Any) -> dict[str, Any]:
        times = {"ts": (start - first) / 1000, "dur": (end - start) / 1000}
        return {"name": name, "ph": "X", "pid": 1, "tid": 1, **times, "args": args}

    events = []
    for phase in phases:
        for one in phase.passes:
            events.append(event(phase.name, one.start, one.end, recorder_us=one.overhead / 1000))
            for call in one.calls:
                cost, ns = call.cost, max(1, call.end - call.start)
                about = {"weights": cost.label} if cost.label else {}
                rates = {"GB/s": cost.moved / ns, "GOP/s": cost.ops / ns}
                events.append(event(call.op, call.start, call.end, **about, **rates))
    return {"displayTimeUnit": "ns", "traceEvents": events}
