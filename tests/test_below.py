"""Scheduler and tree above tiers that come late, in parts, damaged or never.

The executor of test_scheduler keeps what every slot holds; here it also saves and loads, as the runner
does. Whatever the tiers do, every slot that is attended to must hold the right content, every answer
must be the one that a request alone would get, and nothing may be left behind.
"""

import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from elinvar.base.handling import Handling
from elinvar.base.limits import Target
from elinvar.base.plan import BlockMove, PlanItem, StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.kv.tiers.disk import DiskTier
from elinvar.kv.tiers.hierarchy import HOST, NOWHERE, UNKNOWN, Tiers
from elinvar.kv.tiers.host import HostTier
from elinvar.sched.loading import Loading
from elinvar.sched.policy import Deadline, Fair, FirstCome, Policy, Priority
from elinvar.sched.request import Request, Status
from elinvar.sched.scheduler import Scheduler
from test_scheduler import (
    EOS,
    SIZE,
    STATE,
    WINDOWS,
    Bench,
    FakeExecutor,
    SchedulerMachine,
    params,
    prompts,
    sampling,
    spec,
)
from tiers import DOWN, FakeTier, kill_threads

POLICIES = {"fcfs": FirstCome(), "priority": Priority(2.0), "fair": Fair(), "deadline": Deadline()}
Content = tuple[int, ...]


class FakeTicket:
    def __init__(self, tiers: "FakeTiers", keys: Sequence[bytes], is_fetch: bool) -> None:
        self.tiers, self.keys, self.is_fetch = tiers, list(keys), is_fetch
        self.patience = tiers.rng.randrange(6)
        self.num_ready = 0
        self.done = not self.keys
        tiers.tickets[self] = None

    def release(self) -> None:
        self.done = True
        self.keys, self.num_ready = [], 0
        self.tiers.tickets.pop(self, None)


class FakeTiers:
    """What kv.tiers.hierarchy.Tiers means, as bad as it may be: contents vanish, come late or never, or
    are damaged, as `rng` says."""

    def __init__(self, rng: random.Random, room: int, badness: float = 0.1) -> None:
        self.rng, self.room, self.badness = rng, room, badness
        self.names = ["host", "disk", "far"]
        self.host: dict[bytes, Content] = {}
        self.lower: list[dict[bytes, Content]] = [{}, {}]
        self.asked: set[bytes] = set()
        self.tickets: dict[FakeTicket, None] = {}
        self.num_given = 0
        self.ask_s = 0.0

    def bad(self) -> bool:
        return self.rng.random() < self.badness

    # ---- as Tiers ---------------------------------------------------------------------------

    def where(self, keys: Sequence[bytes]) -> list[int]:
        return [self._where(key) for key in keys]

    def _where(self, key: bytes) -> int:
        if key in self.host:
            return HOST
        if key not in self.asked:
            return UNKNOWN
        there = [level for level, tier in enumerate(self.lower, 1) if key in tier]
        return there[0] if there else NOWHERE

    def ask(self, keys: Sequence[bytes], sizes: Sequence[int]) -> FakeTicket:
        assert len(keys) == len(sizes)
        return FakeTicket(self, keys, is_fetch=False)

    def predict(self, levels: Sequence[int], sizes: Sequence[int]) -> float:
        assert len(levels) == len(sizes) and min(levels, default=0) >= HOST
        return self.rng.choice([0.0, 0.0, 0.0, float("inf"), 1e9])

    def fetch(self, keys: Sequence[bytes], sizes: Sequence[int]) -> FakeTicket:
        assert len(keys) == len(sizes)
        ticket = FakeTicket(self, keys, is_fetch=True)
        self._bring(ticket, self.rng.randrange(len(keys) + 1))
        return ticket

    def put(self, key: bytes, data: Content) -> bool:
        if self.bad():
            return False
        self.host[key] = data
        while len(self.host) > self.room:
            idle = [k for k in self.host if not self.is_pinned(k)]
            if not idle:
                break
            self.lose(idle[0])
        return True

    def get(self, key: bytes) -> Content | None:
        content = self.host.get(key)
        if content is None or self.bad():
            self.host.pop(key, None)
            return None
        self.num_given += 1
        return content

    # ---- what happens to it -----------------------------------------------------------------

    def is_pinned(self, key: bytes) -> bool:
        return any(key in ticket.keys[: ticket.num_ready] for ticket in self.tickets)

    def lose(self, key: bytes) -> None:
        content = self.host.pop(key)
        for tier in self.lower:
            if self.rng.random() < 0.5:
                tier[key] = content
        if self.rng.random() < 0.5:
            self.asked.add(key)

    def tick(self) -> None:
        """Time passes: some things come, some are lost."""
        for ticket in list(self.tickets):
            if ticket.done:
                continue
            ticket.patience -= 1
            if ticket.is_fetch:
                self._bring(ticket, self.rng.randrange(3))
            if ticket.patience <= 0:
                ticket.done = True
                if not ticket.is_fetch and not self.bad():
                    self.asked |= set(ticket.keys)
        for store in (self.host, *self.lower):
            if store and self.bad():
                store.pop(self.rng.choice(list(store)), None)

    def _bring(self, ticket: FakeTicket, count: int) -> None:
        for key in ticket.keys[ticket.num_ready : ticket.num_ready + count]:
            there = [self.host, *self.lower]
            found = [store[key] for store in there if key in store]
            if not found:
                ticket.done = True
                return
            self.host[key] = found[0]
            ticket.num_ready += 1
        ticket.done = ticket.done or ticket.num_ready == len(ticket.keys)


class MovingExecutor(FakeExecutor):
    def __init__(self, windows: tuple[int | None, ...], tiers: FakeTiers) -> None:
        super().__init__(windows)
        self.tiers = tiers
        self.spoilt: set[tuple[int, int]] = set()

    def execute(self, plan: StepPlan) -> StepOutput:
        for row in plan.released_rows:
            self.release(row)
        plan.released_rows = []
        for move in plan.saves:
            self.tiers.put(move.key, self.content(move.group, move.block))
        for copy in plan.copies:
            for offset, held in enumerate(self.content(copy.group, copy.source)):
                self.slots[copy.group][copy.target, offset] = held
        plan.copies = []
        lost = []
        self.spoilt = set()
        for move in plan.loads:
            content = self.tiers.get(move.key)
            if content is None:
                lost.append(move.key)
                self.spoilt.add((move.group, move.block))
            for offset in range(SIZE):
                held = content[offset] if content else -1
                self.slots[move.group][move.block, offset] = held
        output = super().execute(plan)
        output.lost = lost
        return output

    def is_spoilt(self, item: PlanItem) -> bool:
        """Whether the row begins with what did not come: it computes something that nobody may use."""
        for group, (window, table) in enumerate(
            zip(self.windows, self.rows[item.row].tables, strict=True)
        ):
            seen = max(0, item.start - (item.start if window is None else window or 2) + 1)
            attended = table[seen // SIZE : (item.start + item.num_tokens - 1) // SIZE + 1]
            if any((group, block) in self.spoilt for block in attended):
                return True
        return False

    def _read(self, item: PlanItem) -> None:
        if not self.is_spoilt(item):
            super()._read(item)
            return
        row = self.rows[item.row]
        for window, slots, table in zip(self.windows, self.slots, row.tables, strict=True):
            for position in range(item.start, row.computed):
                if window != STATE:
                    slots[table[position // SIZE], position % SIZE] = -1

    def _go_on(self, group: int, items: list[PlanItem]) -> None:
        super()._go_on(group, [item for item in items if not self.is_spoilt(item)])
        for item in items:
            if self.is_spoilt(item):
                row = self.rows[item.row]
                self.slots[group][row.tables[group][(row.computed - 1) // SIZE], 0] = -1

    def content(self, group: int, block: int) -> Content:
        slots = self.slots[group]
        return tuple(slots.get((block, offset), 0) for offset in range(SIZE))


class BelowBench(Bench):
    def __init__(
        self,
        windows: tuple[int | None, ...] = (None,),
        blocks: int = 64,
        rows: int = 8,
        budget: int = 64,
        policy: Policy | None = None,
        seed: int = 0,
        room: int = 40,
        step_blocks: int = 2,
        badness: float = 0.1,
    ) -> None:
        super().__init__(windows, blocks, rows, budget, 32)
        specs = [spec(w) for w in windows]
        self.scheduler = Scheduler(
            specs,
            [1 + blocks % 9 if w == STATE else blocks for w in windows],
            rows,
            budget,
            self.context,
            frozenset({EOS}),
            policy=policy,
            clock=lambda: float(self.num_steps),
            interactive=Target(ttft_s=1.0, itl_s=None),
        )
        self.tiers = FakeTiers(random.Random(seed), room, badness)
        self.scheduler.use_tiers(self.tiers)  # type: ignore[arg-type]
        step_bytes = step_blocks * min(one.block_bytes for one in specs)
        self.scheduler.loading.step_bytes = step_bytes
        self.executor: MovingExecutor = MovingExecutor(windows, self.tiers)

    def add(
        self, prompt: list[int], params: SamplingParams, handling: Handling | None = None
    ) -> Request:
        request = Request(
            str(len(self.requests)), list(prompt), params, handling=handling or Handling()
        )
        self.scheduler.add(request)
        self.requests[request.id] = self.alive[request.id] = request
        return request

    def plan(self) -> StepPlan:
        self.num_steps += 1
        self.tiers.tick()
        plan = self.scheduler.plan()
        assert plan.num_tokens <= self.scheduler.max_step_tokens
        if plan.is_empty and self.scheduler.has_work():
            assert self.scheduler.idle_s > 0, "nothing planned, nothing to wait for"
        for request in self.alive.values():
            assert sum(request.ledger.cached.values()) == request.num_cached_tokens
        targets = [(move.group, move.block) for move in plan.loads]
        assert len(set(targets)) == len(targets), "two contents into one block"
        return plan

    def finish_all(self) -> None:
        bound = 200 + 30 * sum(len(r.token_ids) + r.params.max_tokens for r in self.alive.values())
        for _ in range(bound):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.alive and not self.scheduler.has_work(), "not done in the bounded time"
        for _ in range(100):
            if not self.scheduler.kv.has_unsaved:
                break
            self.step()
        assert not self.scheduler.kv.has_unsaved
        self.nothing_leaked()

    def nothing_leaked(self) -> None:
        super().nothing_leaked()
        pending = [ticket for ticket in self.tiers.tickets if ticket.num_ready]
        assert not pending, "pins of nobody"


handlings = st.builds(
    Handling,
    tenant=st.sampled_from(["a", "b"]),
    service=st.sampled_from(["interactive", "interactive", "batch"]),
    priority=st.integers(0, 2),
)


class BelowMachine(SchedulerMachine):
    @initialize(
        windows=st.sampled_from(WINDOWS),
        blocks=st.integers(9, 24),
        rows=st.integers(1, 5),
        budget=st.sampled_from([5, 7, 16, 64]),
        policy=st.sampled_from(sorted(POLICIES)),
        seed=st.integers(0, 1 << 30),
        room=st.sampled_from([3, 20, 200]),
        step_blocks=st.sampled_from([1, 3, 100]),
        badness=st.sampled_from([0.0, 0.02, 0.3]),
    )
    def start(self, policy: str, **options: object) -> None:  # type: ignore[override]
        self.bench = BelowBench(policy=POLICIES[policy], **options)  # type: ignore[arg-type]

    @rule(prompt=prompts, sampling=sampling, handling=handlings)
    def add(self, prompt: list[int], sampling: SamplingParams, handling: Handling) -> None:  # type: ignore[override]
        self.bench.add(prompt, sampling, handling)  # type: ignore[call-arg]

    @rule(count=st.integers(2, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()


BelowMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBelow = BelowMachine.TestCase


def lively(seed: int, windows: tuple[int | None, ...], count: int = 60) -> BelowBench:
    """Some requests of which many begin alike, on a machine of random size, disturbed at random."""
    rng = random.Random(seed)
    bench = BelowBench(
        windows,
        blocks=rng.randint(9, 24),
        rows=rng.randint(1, 5),
        budget=rng.choice([5, 7, 16, 64]),
        policy=POLICIES[rng.choice(sorted(POLICIES))],
        seed=seed,
        room=rng.choice([3, 20, 200]),
        step_blocks=rng.choice([1, 3, 100]),
        badness=rng.choice([0.0, 0.02, 0.3]),
    )
    known = [[rng.randrange(9) for _ in range(24)] for _ in range(3)]
    for _ in range(count):
        for _ in range(rng.randrange(3)):
            begin = rng.choice(known)[: rng.randrange(24)]
            handling = Handling(
                rng.choice("ab"),
                rng.choice(["interactive", "interactive", "batch"]),  # type: ignore[arg-type]
                rng.randrange(3),
            )
            prompt = [*begin, rng.randrange(9)]
            request = bench.add(prompt, params(rng.randint(1, 12), rng.randint(1, 3)), handling)
        plan = bench.plan()
        chance = rng.random()
        if chance < 0.05:
            bench.executor.lost_plan = True
            if chance < 0.025:
                bench.executor.execute(plan)
            continue
        output = bench.executor.execute(plan)
        for request in list(bench.alive.values()):
            chance = rng.random()
            if chance < 0.02:
                bench.abort(request)
            elif chance < 0.1:
                bench.scheduler.preempt(request.id)
        bench.commit(plan, output)
        bench.scheduler.check()
    bench.finish_all()
    return bench


@pytest.mark.parametrize("windows", WINDOWS)
def test_random_lives(windows: tuple[int | None, ...]) -> None:
    benches = [lively(seed, windows) for seed in range(6)]
    assert sum(bench.tiers.num_given for bench in benches) > 20
    assert sum(bench.scheduler.num_preemptions for bench in benches) > 20


LONG = [7, 3, 5, 1, 2, 4, 6, 8, 1, 3, 2, 5, 7, 7, 1, 2, 4]


def returning(**options: Any) -> tuple[BelowBench, Request]:
    """Somebody asks LONG again, of which all is in host memory alone."""
    bench = BelowBench(seed=1, badness=0.0, **options)
    bench.add(LONG, params(3, ignore_eos=True))
    bench.finish_all()
    for pool in bench.scheduler.kv.pools:
        for block in pool.allocate(pool.num_free):
            pool.free(block)
    assert not any(max(n.blocks) >= 0 for n in bench.scheduler.kv.tree.nodes())
    bench.tiers.predict = lambda levels, sizes: 0.0  # type: ignore[method-assign]
    return bench, bench.add(LONG, params(3, ignore_eos=True))


def wait(bench: BelowBench, condition: Callable[[], bool]) -> None:
    for _ in range(30):
        if condition():
            return
        bench.step()
    raise AssertionError("it never happened")


def test_what_was_given_up_comes_back() -> None:
    bench, request = returning(blocks=8, step_blocks=2)
    bench.step()
    bench.finish_all()
    assert request.num_cached_tokens == 16
    assert request.ledger.cached == {"host": 16}
    assert bench.tiers.num_given == 4


@pytest.mark.parametrize("ask_s", [0.5, 2.0])
def test_what_is_computed_before_tiers_answer_is_not_asked_for(ask_s: float) -> None:
    bench, _ = returning(blocks=8)
    below = bench.scheduler.kv._below
    assert below is not None
    below.compute_s = lambda start, end: 1.0
    bench.tiers.ask_s, bench.tiers.host = ask_s, {}
    bench.tiers.asked.clear()
    bench.finish_all()
    assert bool(bench.tiers.asked) == (ask_s < 1)


@pytest.mark.parametrize("patience", [0, 64])
def test_who_does_not_wait_for_another_looks_below(patience: int) -> None:
    """Somebody computes LONG a token a step; meanwhile all of it comes to host memory."""
    bench, first = returning(blocks=20, budget=4, policy=Priority(1.0))
    host, bench.tiers.host = bench.tiers.host, {}
    bench.add([19], params(20, ignore_eos=True))
    wait(bench, lambda: first.num_computed_tokens >= 5)
    bench.tiers.host = host
    urgent = Handling(priority=50)
    second = bench.add([*LONG, 9, 9], params(3, ignore_eos=True), urgent)
    second.patience = patience
    wait(bench, lambda: second.first_scheduled is not None)
    found = second.ledger.cached
    assert (found.get("host", 0) >= SIZE) == (patience == 0) and sum(found.values()) >= 16
    bench.finish_all()


def test_blocks_that_were_superseded_are_forgotten() -> None:
    """Turn after turn each answer's end, saved while the engine was idle, becomes part of a block."""
    bench = BelowBench(blocks=40, badness=0.0, room=10_000)
    known = list(LONG)
    for _ in range(5):
        request = bench.add(known, params(1, ignore_eos=True))
        bench.finish_all()
        known = [*request.token_ids, 3]
    below = bench.scheduler.kv._below
    assert below is not None and len(below._saved) > 5


def test_who_falls_over_a_load_computes() -> None:
    """Even if each step that loads fails."""
    bench, request = returning(blocks=8)
    execute, num_failed = bench.executor.execute, 0
    for _ in range(100):
        plan = bench.plan()
        if plan.loads:
            bench.executor.lost_plan = True
            num_failed += 1
            assert num_failed < 3
            continue
        bench.commit(plan, execute(plan))
    assert num_failed == 1 and request.num_preemptions == 1
    assert request.num_cached_tokens == 0 == sum(request.ledger.cached.values())


def test_who_found_no_room_to_load_is_dropped_with_the_plan() -> None:
    """Its row starts in that plan, too."""
    loading, plan = Loading([spec(None)], 1), StepPlan()
    first, second = Request("0", [1], params()), Request("1", [1], params())
    for number, request in enumerate((first, second)):
        request.loads = [BlockMove(0, number, b"key")]
    loading.begin()
    assert loading.go_on(plan, first) and not loading.go_on(plan, second)
    assert loading.dropped() == [first, second]


def test_states_are_gone_on_from_after_slow_loads() -> None:
    """How much a step computes behind what was loaded is not known when the row starts."""
    bench, request = returning(windows=(None, STATE), blocks=20, step_blocks=1, budget=8)
    wait(bench, lambda: request.is_loading)
    for seed in range(4):
        bench.add([9, seed], params(9, seed, ignore_eos=True))
    bench.finish_all()
    assert request.num_cached_tokens == 16


def test_room_to_load_is_given_back_by_who_goes_away() -> None:
    """A batch request that loads gives way to an interactive one, in one plan."""
    bench, request = returning(blocks=14, rows=1, step_blocks=1)
    bench.abort(request)
    batch = bench.add(LONG, params(3, ignore_eos=True), Handling(service="batch"))
    wait(bench, lambda: batch.is_loading)
    one = bench.add(LONG, params(3, ignore_eos=True))
    for _ in range(20):
        if one.status is Status.RUNNING:
            break
        plan = bench.plan()
        bench.commit(plan, bench.executor.execute(plan))
    bench.finish_all()
    assert batch.num_preemptions == 1


class RealTiers:
    """Tiers of kv.tiers, for an executor whose contents are a few whole numbers."""

    def __init__(self, tiers: Tiers, sizes: Sequence[int]) -> None:
        self.tiers, self.sizes = tiers, sizes
        self.num_given = 0

    def tick(self) -> None:
        pass

    def put(self, key: bytes, data: Content) -> bool:
        return self.tiers.put(key, memoryview(self._form.pack(*data).ljust(self.sizes[key[-1]])))

    def get(self, key: bytes) -> Content | None:
        into = bytearray(self.sizes[key[-1]])
        if not self.tiers.get(key, memoryview(into)):
            return None
        self.num_given += 1
        return self._form.unpack_from(into)

    _form = struct.Struct(f"{SIZE}q")


class LyingTier(FakeTier):
    """And one that says it has what it has not, and gives what it was never given."""

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.contents or key[0] % 3 == 0 for key in keys]


def test_ten_thousand_operations_and_deaths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    rng = random.Random(11)
    windows = (None, 6, STATE)
    bench = BelowBench(windows, blocks=16, rows=4, budget=16, policy=Fair(), step_blocks=3)
    sizes = [one.block_bytes for one in map(spec, windows)]
    host, far = HostTier(None, 300_000, sizes), LyingTier("far")
    tiers = Tiers(host, [DiskTier(tmp_path, 300_000), far], 2, timeout_s=0.2)
    real = bench.tiers = bench.executor.tiers = RealTiers(tiers, sizes)  # type: ignore[assignment]
    bench.scheduler.use_tiers(tiers)
    known = [[rng.randrange(9) for _ in range(24)] for _ in range(12)]
    for number in range(10_000):
        if len(bench.alive) < 6 and rng.random() < 0.5:
            prompt = [*rng.choice(known)[: rng.randrange(24)], rng.randrange(9)]
            bench.add(prompt, params(rng.randint(1, 8), rng.randint(1, 3)))
        if rng.random() < 0.01 and bench.alive:
            bench.abort(rng.choice(list(bench.alive.values())))
        if rng.random() < 0.01 and bench.alive:
            bench.scheduler.preempt(rng.choice(list(bench.alive)))
        if number % 500 == 0:
            kill_threads(tiers)
        far.fail = DOWN if number % 2000 > 1000 else None
        (far.gate.clear if number % 3000 > 2700 else far.gate.set)()
        plan = bench.scheduler.plan()
        if plan.is_empty:
            time.sleep(min(bench.scheduler.idle_s, 0.001))
            continue
        bench.num_steps += 1
        bench.commit(plan, bench.executor.execute(plan))
        if number % 50 == 0:
            bench.scheduler.check()
    far.gate.set()
    while bench.scheduler.has_work() or bench.scheduler.kv.has_unsaved:
        bench.step()
    bench.scheduler.check()
    # How much of it from below the host tier is the machine's to say.
    assert real.num_given > 100 and sum(one.hits for one in tiers.stats()[1:]) > 0
    assert host.num_pinned() == 0
    tiers.close()
    host.check()


def test_one_loads_for_all_who_begin_alike() -> None:
    bench, first = returning(blocks=40, rows=8, step_blocks=2)
    wait(bench, lambda: first.is_loading)
    for seed in range(2, 6):
        bench.add(LONG, params(3, seed, ignore_eos=True))
    loads = 0
    while bench.alive:
        plan = bench.plan()
        loads += len(plan.loads)
        bench.commit(plan, bench.executor.execute(plan))
    assert loads <= len(LONG) // SIZE + 1


def test_who_waits_for_a_tier_takes_nobodys_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, pending = returning(rows=1)
    answer = SimpleNamespace(done=False, num_ready=0, release=lambda: None)
    monkeypatch.setattr(bench.tiers, "where", lambda keys: [UNKNOWN] * len(keys))
    monkeypatch.setattr(bench.tiers, "ask", lambda keys, sizes: answer)
    other = bench.add([9, 9, 9], params(2, ignore_eos=True))
    while other.status is not Status.FINISHED:
        bench.commit(plan := bench.scheduler.plan(), bench.executor.execute(plan))
        assert pending.status is Status.WAITING
    answer.done = True
    bench.commit(plan := bench.scheduler.plan(), bench.executor.execute(plan))
    assert pending.status is Status.RUNNING and not pending.num_cached_tokens
