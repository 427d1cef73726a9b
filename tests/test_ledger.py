"""The ledger of a request: its times add up to the nanosecond, whatever happens to it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.config import KVSpec
from elinvar.base.plan import StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.cli.explain import Records
from elinvar.sched.ledger import MAX_EVENTS, Ledger, Waits, nanoseconds
from elinvar.sched.request import Request
from elinvar.sched.scheduler import Scheduler
from engines import answers, tiny_engine


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Bench:
    """A scheduler on a clock of its own, and steps that sample token 1."""

    def __init__(self, rows: int = 8, blocks: int = 64, budget: int = 8) -> None:
        self.clock = Clock()
        spec = KVSpec("full", (0,), 1, 8, block_size=4)
        self.scheduler = Scheduler(
            [spec], [blocks], rows, budget, 100, frozenset(), clock=self.clock
        )
        self.requests: list[Request] = []

    def add(self, prompt: list[int], max_tokens: int = 4, arrival: float = 0.0) -> Request:
        params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        request = Request(str(len(self.requests)), prompt, params, arrival=arrival)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self, seconds: float = 1.0) -> None:
        plan = self.scheduler.plan()
        self.clock.now += seconds
        self.commit(plan)

    def commit(self, plan: StepPlan) -> None:
        sampled = [[1] if item.sample else [] for item in plan.items]
        self.scheduler.commit(plan, StepOutput(sampled, [[] for _ in sampled]))

    def report(self, request: Request) -> dict[str, Any]:
        return request.ledger.report(self.clock())


def seconds(report: dict[str, Any]) -> dict[str, float]:
    """The parts that took time."""
    return {state: ns / 1e9 for state, ns in report["parts_ns"].items() if ns}


def test_a_request_alone() -> None:
    bench = Bench(budget=8)
    request = bench.add(list(range(1, 21)), max_tokens=3, arrival=997.0)
    bench.clock.now += 0.5
    for _ in range(5):
        bench.step()
    bench.clock.now += 100
    report = bench.report(request)
    assert report["state"] == "finished"
    assert seconds(report) == {"queued": 3.5, "prefill": 3.0, "decode": 2.0}
    assert report["wall_ns"] == 8_500_000_000
    assert report["causes_ns"] == {"queued": {"step": 3_500_000_000}}
    assert report["prefill"] == {"chunks": 3, "tokens": 20}
    assert (report["steps"], report["largest_batch"]) == (5, 1)
    assert report["cached_tokens"] == {} and report["preemptions"] == {}
    assert [(e["at_ns"], e["state"]) for e in report["events"]] == [
        (0, "queued"),
        (3_500_000_000, "prefill"),
        (6_500_000_000, "decode"),
    ]


def test_what_a_wait_was_for() -> None:
    bench = Bench(rows=1)
    bench.add([1, 2], max_tokens=3)
    bench.clock.now += 0.25
    waits = bench.add([3, 4], max_tokens=1)
    bench.clock.now += 0.25
    for _ in range(4):
        bench.step()
    report = bench.report(waits)
    assert seconds(report) == {"queued": 3.25, "prefill": 1.0}
    assert report["causes_ns"]["queued"] == {"step": 250_000_000, "rows": 3_000_000_000}

    bench = Bench(budget=4)
    bench.add([1] * 12, max_tokens=1)
    waits = bench.add([2], max_tokens=1)
    for _ in range(4):
        bench.step()
    assert bench.report(waits)["causes_ns"]["queued"] == {"budget": 3_000_000_000}

    bench = Bench(blocks=6)
    first = bench.add([1, 2, 3, 4, 5], max_tokens=16)
    second = bench.add([6, 7, 8, 9] * 5, max_tokens=1)
    while first.finished is None:
        bench.step()
    assert bench.report(second)["causes_ns"]["queued"]["memory"] > 0


def test_a_preemption_and_what_was_found_again() -> None:
    bench = Bench(budget=16)
    request = bench.add([1, 2, 3, 4, 5], max_tokens=4)
    bench.step()
    bench.step()
    bench.scheduler.preempt(request.id)
    bench.clock.now += 2.0
    for _ in range(2):
        bench.step()
    report = bench.report(request)
    assert seconds(report) == {"prefill": 2.0, "decode": 2.0, "preempted": 2.0}
    assert report["preemptions"] == {"asked": 1}
    assert report["causes_ns"]["preempted"] == {"asked": 2_000_000_000}
    # Known again: 7 tokens, of which only the last was not in the cache.
    assert report["prefill"] == {"chunks": 2, "tokens": 5 + 1}
    again = bench.add([1, 2, 3, 4, 5], max_tokens=1)
    bench.step()
    assert bench.report(again)["cached_tokens"] == {"memory": 4}


def test_who_begins_like_another_waits_for_it() -> None:
    bench = Bench(budget=8)
    first, second = (bench.add(list(range(1, 21)), max_tokens=1) for _ in range(2))
    for _ in range(5):
        bench.step()
    assert bench.report(first)["parts_ns"]["queued"] == 0
    report = bench.report(second)
    assert report["causes_ns"]["queued"] == {"prefix": report["parts_ns"]["queued"]}
    assert report["parts_ns"]["queued"] >= 2_000_000_000
    assert report["cached_tokens"]["memory"] >= 16


def test_fetches_and_limits_have_causes_of_their_own() -> None:
    waits = Waits(5.0)
    ledger = Ledger(waits, 4.0, 5.0)
    waits.wait_for("rows", 6.0)
    ledger.wait("tenant", 7.0)
    waits.wait_for("memory", 8.0)
    ledger.wait("", 9.0)
    ledger.enter("fetching", 11.0, "disk")
    ledger.found("disk", 32)
    ledger.enter("loading", 14.0, "host")
    assert ledger.report(15.0)["parts_ns"] == {
        "queued": 7_000_000_000,
        "fetching": 3_000_000_000,
        "loading": 1_000_000_000,
        "prefill": 0,
        "decode": 0,
        "preempted": 0,
    }
    ledger.end(15.0)
    report = ledger.report(99.0)
    assert report["causes_ns"] == {
        "queued": {"step": 2e9, "rows": 1e9, "tenant": 2e9, "memory": 2e9},
        "fetching": {"disk": 3e9},
        "loading": {"host": 1e9},
    }
    assert report["cached_tokens"] == {"disk": 32}


def test_events_are_bounded_and_times_are_not() -> None:
    ledger = Ledger(Waits(0.0), 0.0, 0.0)
    for i in range(2 * MAX_EVENTS):
        ledger.enter("preempted", i + 1.0, "memory")
        ledger.enter("prefill", i + 1.5)
    ledger.end(2 * MAX_EVENTS + 1.0)
    report = ledger.report(0.0)
    assert len(report["events"]) == MAX_EVENTS
    assert report["preemptions"] == {"memory": 2 * MAX_EVENTS}
    assert sum(report["parts_ns"].values()) == report["wall_ns"]


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12)),
    st.tuples(st.just("step"), st.floats(0, 3), st.just(0)),
    st.tuples(st.just("lose"), st.floats(0, 3), st.just(0)),
    st.tuples(st.just("preempt"), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 40), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ACTIONS, max_size=40),
    st.integers(1, 4),
    st.integers(8, 20),
    st.integers(4, 16),
    st.floats(1, 1e7),
)
def test_parts_add_up(
    actions: list[tuple[str, Any, int]], rows: int, blocks: int, budget: int, start: float
) -> None:
    bench = Bench(rows, blocks, budget)
    bench.clock.now = start
    for what, how, more in actions:
        if what == "add":
            number = len(bench.requests)
            bench.add([number % 3] * how, min(more, 4 * blocks - how), bench.clock() - number / 7e5)
        elif what == "step":
            bench.step(how)
        elif what == "lose":
            bench.scheduler.plan()
            bench.clock.now += how
        elif what == "preempt":
            bench.scheduler.preempt(str(how))
        else:
            bench.scheduler.abort(str(how))
        assert_exact(bench)
    for _ in range(10_000):
        if not bench.scheduler.has_work():
            break
        bench.step(1 / 3)
    assert_exact(bench)


def assert_exact(bench: Bench) -> None:
    now = bench.clock()
    for request in bench.requests:
        report = request.ledger.report(now)
        end = now if request.finished is None else request.finished
        assert report["wall_ns"] == nanoseconds(end) - nanoseconds(request.arrival)
        assert sum(report["parts_ns"].values()) == report["wall_ns"]
        assert sum(report["preemptions"].values()) == request.num_preemptions
        for state, causes in report["causes_ns"].items():
            assert sum(causes.values()) == report["parts_ns"][state]


def test_an_engine_short_of_memory() -> None:
    """Whoever drives it: each request that ended is told of once, with parts that add up."""
    engine, records = tiny_engine(num_blocks=8, max_rows=4, prefix_cache=False), Records()
    engine.watchers.append(records)
    prompts = [[i + 1] * 40 for i in range(6)]
    params = SamplingParams(max_tokens=100, seed=1, ignore_eos=True)
    answers(engine, prompts, [params] * 6)
    gone = engine.add([1, 2, 3], params)
    assert engine.explain(gone) is not None and engine.abort(gone)
    assert engine.explain(gone) is None
    assert [one["finish_reason"] for one in records.values()] == ["length"] * 6 + ["abort"]
    assert sum(sum(one["preemptions"].values()) for one in records.values()) > 0
    for one in records.values():
        assert sum(one["parts_ns"].values()) == one["wall_ns"] > 0
        again = one["parts_ns"]["preempted"] > 0
        assert again == (one["prefill"]["tokens"] > one["prompt_tokens"])
