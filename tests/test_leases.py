"""Sessions and their leases: who yields first, that nobody who runs is kept waiting, and that answers
are the same to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elinvar.base.errors import InputError
from elinvar.base.handling import Handling
from elinvar.base.limits import TenantLimits
from elinvar.base.plan import StepOutput
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.kv.pauses import _NUM_BINS, _WIDTHS, Pauses, _hazard
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import SequenceKV
from elinvar.kv.session import Hints, NoSessionError, Session
from elinvar.kv.sessions import Sessions
from elinvar.sched.request import Request
from elinvar.sched.scheduler import Scheduler
from engines import answers, tiny_engine
from test_kv_manager import SIZE, STATE, manager, path, spec
from test_liveness import POLICIES, Ask, Machine, Run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Running:
    session: Session | None
    seq: SequenceKV
    tokens: list[int]
    done: int


class Turns:
    """A manager with sessions, and what runs there."""

    def __init__(self, *windows: int | None, blocks: int = 32, share: float = 1.0) -> None:
        self.clock = Clock()
        self.kv = manager(*windows, blocks=blocks)
        limits = {"small": TenantLimits(lease_share=share)}
        self.sessions = Sessions(self.kv, self.clock, limits)
        self.running: list[Running] = []

    def begin(self, tokens: list[int], name: str | None = None, tenant: str = "") -> Running | None:
        session = self.sessions.begin(Handling(tenant, session=name))
        seq = self.kv.new_sequence()
        prefix = self.kv.find_prefix(seq, tokens)
        allocation = self.kv.prepare(seq, prefix.num_tokens, len(tokens), prefix)
        if allocation is None:
            if session is not None:
                self.sessions.end(session, [], len(tokens), None)
            return None
        self.kv.apply(allocation)
        self.kv.advance(seq, tokens, allocation.end)
        self.running.append(Running(session, seq, tokens, allocation.end))
        return self.running[-1]

    def end(self, one: Running, cached: int = 0) -> None:
        self.running.remove(one)
        path = self.kv.free(one.seq, one.tokens, one.done)
        if one.session is not None:
            self.sessions.end(one.session, path, len(one.tokens), cached)

    def turn(self, tokens: list[int], name: str | None = None, tenant: str = "") -> None:
        one = self.begin(tokens, name, tenant)
        assert one is not None and one.done == len(tokens)
        self.end(one)

    def check(self) -> None:
        self.kv.check([one.seq for one in self.running])
        self.sessions.check()


def whole(turns: Turns, tokens: list[int]) -> bool:
    nodes = path(turns.kv, tokens)
    return len(nodes) == len(tokens) // SIZE and all(node.blocks[0] >= 0 for node in nodes)


def press(turns: Turns, count: int) -> None:
    """Somebody takes so many blocks and gives them back without content."""
    pool = turns.kv.pools[0]
    for block in pool.allocate(count):
        pool.free(block)


def words(start: int, num_blocks: int) -> list[int]:
    return list(range(start, start + num_blocks * SIZE))


# ---- who yields first ---------------------------------------------------------------------------


def test_without_a_session_pools_choose_alone() -> None:
    turns = Turns(None)
    turns.turn(words(0, 4))
    assert turns.kv.pools[0].choose is None


def test_what_nobody_comes_back_to_goes_before_what_was_used_last() -> None:
    turns = Turns(None, blocks=8)
    turns.turn(words(0, 2), "kept")
    turns.turn(words(100, 2))
    turns.turn(words(200, 2), "ended")
    turns.sessions.hint("ended", hints=Hints(expect_return_s=0))
    press(turns, 4)
    assert whole(turns, words(0, 2)) and whole(turns, words(100, 2))
    assert not path(turns.kv, words(200, 2))
    press(turns, 6)
    assert whole(turns, words(0, 2)) and not path(turns.kv, words(100, 2))
    press(turns, 7)
    assert len(path(turns.kv, words(0, 2))) == 1, "the end goes before the beginning"
    press(turns, 8)
    turns.check()


def test_a_newer_turn_takes_the_place_of_the_one_before() -> None:
    turns = Turns(None, blocks=8)
    turns.turn(words(0, 4), "a")
    turns.turn([*words(0, 1), *words(100, 2)], "a")
    turns.turn(words(200, 2))
    press(turns, 4)  # one was free
    assert not whole(turns, words(0, 2)), "the branch that it left"
    assert whole(turns, words(200, 1)) and whole(turns, [*words(0, 1), *words(100, 2)])


def test_all_answers_to_one_turn_are_kept() -> None:
    turns = Turns(None)
    both = [turns.begin([*words(0, 1), *words(start, 1)], "a") for start in (100, 200)]
    for one in both:
        assert one is not None
        turns.end(one)
    assert turns.sessions.info("a").turns == 1
    assert len(turns.kv.pools[0].leases) == 3
    turns.turn([*words(0, 1), *words(200, 2)], "a")
    assert len(turns.kv.pools[0].leases) == 3
    turns.check()


def test_what_two_sessions_share_goes_with_the_last_of_them() -> None:
    turns = Turns(None, blocks=6)
    turns.turn([*words(0, 2), *words(100, 2)], "a")
    turns.turn([*words(0, 2), *words(200, 2)], "b")
    press(turns, 4)
    assert whole(turns, words(0, 2))


def test_farther_returns_yield_first_and_the_late_do_not_stay() -> None:
    turns = Turns(None, blocks=4)
    turns.turn(words(0, 2), "far")
    turns.sessions.hint("far", hints=Hints(expect_return_s=500))
    turns.turn(words(100, 2), "near")
    turns.sessions.hint("near", hints=Hints(expect_return_s=5))
    press(turns, 2)
    assert whole(turns, words(100, 2)) and not path(turns.kv, words(0, 2))
    turns.turn(words(0, 2), "far")
    turns.sessions.hint("far", hints=Hints(expect_return_s=500))
    turns.clock.now += 3000
    turns.sessions.hint("far", hints=Hints(expect_return_s=500))
    press(turns, 2)
    assert whole(turns, words(0, 2)) and not path(turns.kv, words(100, 2))


def test_who_waits_yields_after_those_who_pause() -> None:
    turns = Turns(None, blocks=4)
    turns.turn(words(0, 2), "waits")
    turns.turn(words(100, 2), "pauses")
    turns.sessions.hint("pauses", hints=Hints(expect_return_s=0.01))
    turns.sessions.begin(Handling(session="waits"))
    press(turns, 2)
    assert whole(turns, words(0, 2)) and not path(turns.kv, words(100, 2))


def test_a_tenant_keeps_to_its_budget_and_cuts_what_is_worth_least() -> None:
    turns = Turns(None, blocks=16, share=0.25)
    turns.turn(words(0, 3), "old", "small")
    turns.clock.now = 1000
    turns.turn(words(100, 3), "new", "small")
    kept = {one.name: one.leased_tokens // SIZE for one in turns.sessions.of("small")}
    assert kept == {"old": 1, "new": 3}
    turns.turn(words(200, 9), "new", "small")
    turns.turn(words(300, 3), "other")
    kept = {one.name: one.leased_tokens // SIZE for one in turns.sessions.of("small")}
    assert kept == {"old": 0, "new": 4}
    turns.check()


def test_sessions_expire_and_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elinvar.kv.sessions.MAX_SESSIONS", 3)
    turns = Turns(None)
    for name in "abcd":
        turns.turn(words(ord(name) * 100, 2), name)
        turns.clock.now += 1
    assert [one.name for one in turns.sessions.of()] == ["d", "c", "b"]
    turns.sessions.hint("b", hints=Hints(ttl_s=1e6))
    turns.clock.now += 4000
    assert [one.name for one in turns.sessions.of()] == ["b"]
    turns.check()
    turns.sessions.delete("b")
    assert not turns.kv.pools[0].leases and not turns.sessions.num_sessions


def test_who_makes_room_is_neither_busy_nor_what_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elinvar.kv.sessions.MAX_SESSIONS", 3)
    turns = Turns(None)
    running = turns.begin(words(0, 2), "busy")
    assert running is not None
    for name in "abc":
        turns.turn(words(ord(name) * 100, 2), name)
    assert [one.name for one in turns.sessions.of()] == ["c", "b", "busy"]
    turns.sessions.fork("b", ["d"])
    assert {one.name for one in turns.sessions.of()} == {"d", "b", "busy"}
    turns.end(running)
    turns.check()


def test_a_session_that_is_deleted_amid_a_turn_is_gone() -> None:
    turns = Turns(None)
    one = turns.begin(words(0, 2), "a")
    assert one is not None
    turns.sessions.delete("a")
    other = turns.begin(words(0, 2), "a")
    turns.end(one)
    assert turns.sessions.info("a").running == 1 and other is not None
    turns.end(other)
    turns.check()


def test_a_cancelled_turn_takes_nothing_away() -> None:
    turns = Turns(None)
    turns.turn(words(0, 4), "a")
    one = turns.begin([*words(0, 2), 7], "a")
    assert one is not None
    one.done = 2 * SIZE
    turns.end(one)
    assert turns.sessions.info("a").num_tokens == 4 * SIZE


def test_what_was_lost_and_computed_again_is_leased_again() -> None:
    turns = Turns(None, blocks=8)
    turns.turn(words(0, 4), "a")
    for node in path(turns.kv, words(0, 4)):
        node.saved = True  # as if there were tiers: nodes outlive their blocks
    press(turns, 6)
    assert turns.sessions.info("a").leased_tokens == 2 * SIZE
    turns.turn(words(0, 4), "a")
    assert turns.sessions.info("a").leased_tokens == 4 * SIZE
    turns.check()


def test_names_and_hints_are_checked() -> None:
    sessions = Turns(None).sessions
    sessions.create("a")
    for wrong in ("a", "", "x" * 300, "b/fork"):
        with pytest.raises(InputError):
            sessions.create(wrong)
    with pytest.raises(InputError):
        sessions.fork("a", ["b", "b"])
    for name in ("info", "hint", "delete"):
        with pytest.raises(NoSessionError):
            getattr(sessions, name)("b")
        with pytest.raises(NoSessionError):
            getattr(sessions, name)("a", "another tenant")
    for field, value in (("ttl_s", 0), ("expect_return_s", -1), ("pause_kind", "x" * 300)):
        with pytest.raises(InputError, match=field):
            Hints(**{field: value})  # type: ignore[arg-type]


# ---- what is learned ------------------------------------------------------------------------------


def test_a_class_learns_when_its_sessions_come_back() -> None:
    pauses = Pauses()
    for _ in range(200):
        pauses.end(pauses.begin("", "tests", 0, None), 10, came_back=True)
        pauses.end(pauses.begin("", "human", 0, None), 300, came_back=True)
        pauses.end(pauses.begin("", "human", 0, None), 3600, came_back=False)
    tests, human = pauses.begin("", "tests", 0, None), pauses.begin("", "human", 0, None)
    assert pauses.expected_s(tests) == pytest.approx(10, rel=0.2)
    assert pauses.worth(tests) > 10 * pauses.worth(human)
    before, at_first = pauses.worth(human), pauses.worth(tests)
    for one in (tests, human):
        pauses.look(one, 250)
    assert pauses.worth(human) > before, "about to come back"
    assert pauses.worth(tests) < at_first / 10, "who is late is not expected"
    # Of a kind that nobody knows: as everybody.
    other = pauses.begin("", "?", 0, None)
    assert at_first > pauses.worth(other) > before


def test_hints_are_units_of_what_is_learned() -> None:
    pauses = Pauses()
    for told in (1, 10, 100):
        for _ in range(50):  # they always come back at twice what they say
            pauses.end(pauses.begin("", "", 0, told), 2 * told, came_back=True)
    pause = pauses.begin("", "", 0, 7)
    assert pauses.expected_s(pause) == pytest.approx(14, rel=0.2)
    assert pauses.worth(pause) == pytest.approx(1 / 14, rel=0.2)


@pytest.mark.parametrize("ends", [[1], [0.1, 5, 5, 60], [2, 2, 2, 900, 1000], list(range(1, 60))])
def test_the_index_is_the_best_of_all_horizons(ends: list[float]) -> None:
    pauses = Pauses()
    for end in ends:
        pauses.end(pauses.begin("", "", 0, None), end, came_back=True)
    pause = pauses.begin("", "", 0, None)
    history, everybody = pause.histories
    pauses.worth(pause)
    for first in range(0, _NUM_BINS, 7):
        best, here, chance, seconds = 0.0, 1.0, 0.0, 0.0
        for index in range(first, _NUM_BINS):
            hazard = _hazard(history, everybody, index)
            gone = 1 - math.exp(-hazard * _WIDTHS[index])
            chance += here * gone
            seconds += here * gone / hazard
            here *= 1 - gone
            best = max(best, chance / seconds)
        assert history.index[first] == pytest.approx(best)


# ---- state machine --------------------------------------------------------------------------------


def victim(sessions: Sessions, pool: BlockPool) -> int | None:
    """Which block must be given up next, by looking at everything; None: one without content."""
    if pool.num_free > len(pool.cached) + len(pool.leased):
        return None
    if pool.cached:
        return next(iter(pool.cached))
    leases = [s.lease for a in sessions._accounts.values() for s in a.sessions.values()]
    counts = dict(pool.leases)
    for lease in sorted(leases, key=lambda lease: (lease.rank, lease.entry)):
        for node in reversed(lease.nodes[pool.group]):
            counts[node] -= 1
            block = node.blocks[pool.group]
            if not counts[node] and block in pool.leased:
                return block
    raise AssertionError("leased, and by nobody")


class LeaseMachine(RuleBasedStateMachine):
    @initialize(
        windows=st.sampled_from([(None,), (None, 6), (None, STATE)]),
        blocks=st.integers(3, 20),
        share=st.sampled_from([0.0, 0.3, 1.0]),
    )
    def set_up(self, windows: tuple[int | None, ...], blocks: int, share: float) -> None:
        self.turns = Turns(*windows, blocks=blocks, share=share)
        self.known: list[list[int]] = [[0]]

    tenants = st.sampled_from(["", "small"])
    names = st.sampled_from(["a", "b", "c", None])

    @rule(
        data=st.data(),
        name=names,
        tenant=tenants,
        more=st.lists(st.integers(0, 1), min_size=1, max_size=14),
    )
    def begin(self, data: st.DataObject, name: str | None, tenant: str, more: list[int]) -> None:
        tokens = [*data.draw(st.sampled_from(self.known)), *more][-40:]
        free = [pool.num_free for pool in self.turns.kv.pools]
        one = self.turns.begin(tokens, name, tenant)
        assert one is not None or min(free) == 0 or free[0] < -(-len(tokens) // SIZE)
        self.known.append(tokens)

    @precondition(lambda self: self.turns.running)
    @rule(data=st.data(), known=st.booleans())
    def end(self, data: st.DataObject, known: bool) -> None:
        one = data.draw(st.sampled_from(self.turns.running))
        one.done *= known
        self.turns.end(one)

    @rule(seconds=st.sampled_from([0.01, 1.0, 30.0, 2000.0]))
    def wait(self, seconds: float) -> None:
        self.turns.clock.now += seconds

    @rule(name=names, tenant=tenants, expect=st.sampled_from([None, 0, 0.5, 100]))
    def hint(self, name: str | None, tenant: str, expect: float | None) -> None:
        if name in [one.name for one in self.turns.sessions.of(tenant)]:
            assert name is not None
            self.turns.sessions.hint(name, tenant, Hints(expect, pause_kind="tool"))

    @rule(name=names, new=names, tenant=tenants)
    def fork(self, name: str | None, new: str | None, tenant: str) -> None:
        there = [one.name for one in self.turns.sessions.of(tenant)]
        if name in there and new not in there and new is not None:
            assert name is not None
            used = [pool.num_free for pool in self.turns.kv.pools]
            self.turns.sessions.fork(name, [new], tenant)
            assert used == [pool.num_free for pool in self.turns.kv.pools]

    @rule(name=names, tenant=tenants)
    def delete(self, name: str | None, tenant: str) -> None:
        if name in [one.name for one in self.turns.sessions.of(tenant)]:
            assert name is not None
            self.turns.sessions.delete(name, tenant)

    @rule(data=st.data(), keep=st.booleans())
    def press(self, data: st.DataObject, keep: bool) -> None:
        """Every free block can be had, in the promised order."""
        for pool in self.turns.kv.pools:
            count = data.draw(st.integers(0, pool.num_free))
            taken = []
            for _ in range(count):
                self.turns.sessions.of()  # ranks are those of now
                expected = victim(self.turns.sessions, pool)
                [block] = pool.allocate(1)
                assert expected in (None, block)
                taken.append(block)
            for block in taken:
                pool.free(block)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "turns"):
            self.turns.check()
            for pool in self.turns.kv.pools:
                held = sum(pool.ref_count(block) > 0 for block in range(pool.num_blocks))
                assert pool.num_free + held == pool.num_blocks, "a lease keeps a block"

    def teardown(self) -> None:
        if hasattr(self, "turns"):
            for one in self.turns.running[:]:
                self.turns.end(one)
            for tenant in ("", "small"):
                for info in self.turns.sessions.of(tenant):
                    self.turns.sessions.delete(info.name, tenant)
            self.turns.check()
            assert not any(pool.leases or pool.leased for pool in self.turns.kv.pools)


LeaseMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeases = LeaseMachine.TestCase


# ---- the scheduler ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn(Ask):
    session: str | None = None
    expect: float | None = None

    def request(self, index: int) -> Request:
        params = SamplingParams(self.answer, seed=1, ignore_eos=True)
        handling = Handling(
            self.tenant, self.service, session=self.session, expect_return_s=self.expect
        )
        # Turns of one session begin alike.
        at = 0 if self.session == "a" else index * 100
        prompt = [at + i for i in range(self.prompt)]
        return Request(str(index), prompt, params, handling=handling)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("windows", [(None,), (None, 6), (None, STATE)])
def test_whatever_sessions_keep_all_requests_end(
    policy: str, windows: tuple[int | None, ...]
) -> None:
    names, shapes = ("a", "b", None), [(5, 4), (9, 3)]
    machine = Machine(blocks=3 if windows == (None,) else 4, rows=2, budget=8, windows=windows)
    for sessions in product(names, repeat=3):
        for shape, arrivals in product(product(shapes, repeat=3), ((0, 0, 1), (0, 9, 20))):
            turns = [
                Turn(at, *one, "ab"[index % 2], session=name, expect=(None, 0, 5)[index])
                for index, (at, one, name) in enumerate(zip(arrivals, shape, sessions, strict=True))
            ]
            Run(machine, POLICIES[policy], turns).to_the_end()


def drive(scheduler: Scheduler, clock: Clock, prompt: list[int], handling: Handling) -> int:
    """One request to its end; how many tokens of its prompt were computed."""
    request = Request(f"{clock.now}", list(prompt), SamplingParams(2, seed=1), handling=handling)
    scheduler.add(request)
    while scheduler.has_work():
        plan = scheduler.plan()
        sampled = [[7] if item.sample else [] for item in plan.items]
        scheduler.commit(plan, StepOutput(sampled, [[] for _ in sampled]))
    clock.now += 0.1
    return len(prompt) - request.num_cached_tokens


def computed(with_sessions: bool) -> tuple[int, Scheduler]:
    """Four agents whose tools take seconds, among forty who read for hours."""
    clock = Clock()
    scheduler = Scheduler([spec()], [60], 4, 64, 400, frozenset(), clock=clock)
    count = 0
    for turn in range(1, 12):
        for name in range(40):
            reader = name >= 4
            if reader and (name + turn) % 6:
                continue
            kind = "reading" if reader else "shell"
            handling = Handling(session=f"{name}", pause_kind=kind) if with_sessions else Handling()
            tokens = [name * 1000 + i for i in range(16)] + [7, 7, 8, 9] * turn
            count += drive(scheduler, clock, tokens, handling)
    scheduler.check()
    return count, scheduler


def test_those_who_come_back_soon_are_kept() -> None:
    (without, _), (count, scheduler) = computed(False), computed(True)
    assert count < 0.8 * without
    returns = scheduler.sessions.returns
    assert returns["hit"] >= 30 and returns["miss"] > 0


# ---- bits -------------------------------------------------------------------------------------------


def one_turn(engine: Engine, prompt: Sequence[int], session: str | None) -> tuple[object, int]:
    params = SamplingParams(6, temperature=0.8, seed=3, logprobs=3, ignore_eos=True)
    handling = Handling(session=session)
    engine.add(list(prompt), params, "one", handling)
    tokens: list[object] = []
    cached = 0
    while engine.has_work:
        for delta in engine.step():
            tokens += zip(delta.token_ids, delta.logprobs, strict=True)
            cached = delta.num_cached_tokens
    return tokens, cached


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_returned_and_forked_sessions_answer_as_a_fresh_engine(family: str) -> None:
    engine, prompt = tiny_engine(family), [i % 250 for i in range(77)]
    first, _ = one_turn(engine, prompt, "a")
    longer = [*prompt, *range(5, 60)]
    in_use = len(engine.scheduler.kv.pools[0].leases)
    engine.sessions.fork("a", ["b", "c"])
    assert len(engine.scheduler.kv.pools[0].leases) == in_use, "the same blocks"
    engine.sessions.delete("a")
    fresh, none = one_turn(tiny_engine(family), longer, None)
    assert none == 0
    for name in "bc":
        answer, cached = one_turn(engine, longer, name)
        assert answer == fresh and cached >= 64
    again, _ = one_turn(engine, prompt, "b")
    assert again == first
    engine.scheduler.check()


def test_a_fork_copies_no_more_than_the_block_it_writes_in() -> None:
    engine, prompt = tiny_engine(), [i % 250 for i in range(70)]
    one_turn(engine, prompt, "a")
    engine.sessions.fork("a", ["b", "c", "d"])
    free = engine.scheduler.kv.pools[0].num_free
    params = SamplingParams(3, seed=1, ignore_eos=True)
    for name in "bcd":
        engine.add([*prompt, ord(name)], params, name, Handling(session=name))
    plan = engine.scheduler.plan()
    assert len(plan.copies) == 3 and engine.scheduler.kv.pools[0].num_free == free - 3 - 2
    assert all(start.blocks[0][:2] == plan.started[0].blocks[0][:2] for start in plan.started)
    engine.runner.begin(plan).finish()
    for name in "bcd":
        engine.abort(name)


def test_pushed_weights_end_all_leases() -> None:
    engine = tiny_engine()
    answers(engine, [[1] * 40], [SamplingParams(2, seed=1)])
    one_turn(engine, [2] * 80, "a")
    engine.sessions.forget_contents()
    assert not engine.scheduler.kv.pools[0].leases
    assert engine.sessions.info("a").num_tokens == 0
    engine.scheduler.check()


def test_a_session_knows_where_its_tokens_are() -> None:
    engine = tiny_engine(num_blocks=8)
    one_turn(engine, list(range(100)), "a")
    info = engine.sessions.info("a")
    assert (info.num_tokens, info.tokens_in_memory, info.tokens_below) == (105, 105, 0)
    assert info.turns == 1 and info.running == 0 and info.leased_tokens == 105
    one_turn(engine, [9] * 200, None)
    info = engine.sessions.info("a")
    assert info.tokens_in_memory is not None and info.tokens_in_memory < 105
    assert info.num_tokens == 105


def test_host_memory_forgets_first_what_nobody_comes_back_to() -> None:
    size = tiny_engine().scheduler.kv._block_bytes[0]
    engine = tiny_engine(num_blocks=8, kv_host_memory=200 * (size + 4096))
    one_turn(engine, list(range(100)), "kept")
    one_turn(engine, [7] * 240, None)  # takes all the memory there is
    for index in range(100):
        params = SamplingParams(2, seed=1, ignore_eos=True)
        handling = Handling(session=f"ended {index}", expect_return_s=0)
        engine.add([index] * 100, params, handling=handling)
        while engine.has_work:
            engine.step()
    assert engine.tiers is not None and 0.5 < engine.tiers.host_share < 1
    info = engine.sessions.info("kept")
    assert info.tokens_in_memory == 0 and info.tokens_below is not None
    assert info.tokens_below >= 96
    answer, cached = one_turn(engine, list(range(100)), "kept")
    assert cached >= 96 and answer == one_turn(tiny_engine(), list(range(100)), None)[0]
    engine.close()
