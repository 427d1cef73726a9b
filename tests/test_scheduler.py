"""Scheduler behind a fake executor that samples a pure function of the tokens so far.

The executor is built from the plan alone, as the runner is, and keeps a model of the KV cache:
what every slot holds, and, for each query, that every position it attends to holds exactly its own
prefix. So wrong sharing, early frees and stale blocks fail at the step that makes them.
"""

import random
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elinvar.base.config import DeltaConfig, KVSpec
from elinvar.base.errors import InputError
from elinvar.base.handling import NO_WISHES, Handling
from elinvar.base.limits import TenantLimits
from elinvar.base.plan import PlanItem, StepOutput, StepPlan, TokenLogprobs
from elinvar.base.sampling import SamplingParams
from elinvar.sched.policy import Deadline, Fair, FirstCome, Policy, Priority
from elinvar.sched.request import Request, RequestUpdate, Status
from elinvar.sched.scheduler import Scheduler

SIZE = 4
VOCAB = 20
EOS = 0
STATE = 0
"""Among windows: a group of recurrent states, each the size of some blocks of keys."""


def next_token(tokens: list[int], seed: int) -> int:
    return (hash((seed, *tokens)) >> 17) % VOCAB


def answer(prompt: list[int], params: SamplingParams, max_context: int) -> tuple[list[int], str]:
    """What a request alone must bring."""
    tokens, stops = list(prompt), set(params.stop_token_ids)
    if not params.ignore_eos:
        stops.add(EOS)
    while True:
        tokens.append(next_token(tokens, params.seed or 0))
        if tokens[-1] in stops:
            return tokens[len(prompt) :], "stop"
        if len(tokens) == min(len(prompt) + params.max_tokens, max_context):
            return tokens[len(prompt) :], "length"


@dataclass
class Row:
    request_id: str
    tokens: list[int]
    seed: int
    tables: list[list[int]]
    computed: int
    """-1 until its first item says where the cached prefix ends."""


def spec(window: int | None) -> KVSpec:
    if window == STATE:
        return KVSpec("linear", (0,), 1, 8, block_size=SIZE, state=DeltaConfig(1, 1, 8, 16, 2))
    kind = "full" if window is None else "sliding"
    return KVSpec(kind, (0,), 1, 8, window=window, block_size=SIZE)  # type: ignore[arg-type]


class FakeExecutor:
    def __init__(self, windows: tuple[int | None, ...]) -> None:
        self.windows = windows
        self.rows: dict[int, Row] = {}
        self.lost_plan = False
        # Per group, block and offset: a fingerprint of the tokens up to that position.
        self.slots: list[dict[tuple[int, int], int]] = [{} for _ in windows]

    def execute(self, plan: StepPlan) -> StepOutput:
        for row in plan.released_rows:
            self.release(row)
        for copy in plan.copies:
            slots = self.slots[copy.group]
            for offset in range(SIZE):
                slots[copy.target, offset] = slots.get((copy.source, offset), 0)
        for start in plan.started:
            assert start.row not in self.rows, "row in use"
            tables = [list(blocks) for blocks in start.blocks]
            assert len({len(table) for table in tables}) == 1
            self.rows[start.row] = Row(
                start.request_id, list(start.token_ids), start.params.seed or 0, tables, -1
            )
        assert len({item.row for item in plan.items}) == len(plan.items)
        for item in plan.items:
            self._write(item)
        for group, window in enumerate(self.windows):
            if window == STATE:
                self._go_on(group, plan.items)
        for item in plan.items:
            self._read(item)
        output = StepOutput([], [])
        for item in plan.items:
            sampled = self._sample(item)
            output.sampled.append(sampled)
            output.logprobs.append([TokenLogprobs(float(-t), []) for t in sampled])
        return output

    def release(self, row: int) -> None:
        # Only after a lost plan is a row released again, or released that was never started.
        assert row in self.rows or self.lost_plan
        self.rows.pop(row, None)

    def _write(self, item: PlanItem) -> None:
        row = self.rows[item.row]
        assert row.request_id == item.request_id
        assert item.num_tokens > 0 and row.computed in (-1, item.start)
        row.computed = item.start + item.num_tokens
        assert row.computed <= len(row.tokens)
        assert item.sample == (row.computed == len(row.tokens))
        for table, blocks in zip(row.tables, item.new_blocks, strict=True):
            table += blocks
        for position in range(item.start, row.computed):
            content = hash(tuple(row.tokens[: position + 1]))
            for window, slots, table in zip(self.windows, self.slots, row.tables, strict=True):
                if window != STATE:
                    slots[table[position // SIZE], position % SIZE] = content
        for position in range(row.computed, row.computed + item.num_drafts):
            # Whether it comes true or not, it is overwritten before anybody may see it.
            for slots, table in zip(self.slots, row.tables, strict=True):
                assert table[position // SIZE] >= 0, "no room for a draft"
                slots[table[position // SIZE], position % SIZE] = 0

    def _go_on(self, group: int, items: list[PlanItem]) -> None:
        """States are read and written at once, whatever the order of sequences."""
        states = self.slots[group]
        moves = []
        for item in items:
            row = self.rows[item.row]
            before = row.tables[group][(item.start - 1) // SIZE] if item.start else None
            moves.append((before, row.tables[group][(row.computed - 1) // SIZE]))
            if before is not None:
                content = hash(tuple(row.tokens[: item.start]))
                assert states[before, 0] == content, "goes on from a foreign state"
        assert all(after >= 0 for _, after in moves), "no place for a state"
        assert len({after for _, after in moves}) == len(moves), "two states in one block"
        for before, after in moves:
            others = [a for b, a in moves if (b, a) != (before, after)]
            assert before not in others, "overwritten while it is read"
        for item, (_, after) in zip(items, moves, strict=True):
            row = self.rows[item.row]
            states[after, 0] = hash(tuple(row.tokens[: row.computed]))

    def _read(self, item: PlanItem) -> None:
        row = self.rows[item.row]
        for window, slots, table in zip(self.windows, self.slots, row.tables, strict=True):
            if window == STATE:
                continue
            # The union of what the queries of this span attend to.
            first = 0 if window is None else max(0, item.start - window + 1)
            for position in range(first, row.computed):
                block = table[position // SIZE]
                assert block >= 0, "attends to a block not held"
                content = hash(tuple(row.tokens[: position + 1]))
                assert slots[block, position % SIZE] == content, "attends to foreign content"

    def _sample(self, item: PlanItem) -> list[int]:
        if not item.sample:
            return []
        row = self.rows[item.row]
        right = hash((row.seed, row.computed)) % (item.num_drafts + 1)
        sampled = []
        for _ in range(right + 1):
            sampled.append(next_token(row.tokens, row.seed))
            row.tokens.append(sampled[-1])
        for position in range(row.computed, row.computed + right):
            content = hash(tuple(row.tokens[: position + 1]))
            for slots, table in zip(self.slots, row.tables, strict=True):
                slots[table[position // SIZE], position % SIZE] = content
        row.computed += right
        return sampled


class Bench:
    """A scheduler, its executor, and the books of what was asked for."""

    def __init__(
        self,
        windows: tuple[int | None, ...] = (None,),
        blocks: int = 64,
        rows: int = 8,
        budget: int = 64,
        context: int = 100,
        prefix_cache: bool = True,
        policy: Policy | None = None,
        num_layers: int = 1,
        max_drafts: int = 0,
    ) -> None:
        self.context = context
        self.ticks = count(0.0, 0.001)
        self.scheduler = Scheduler(
            [spec(w) for w in windows],
            [1 + blocks % 9 if w == STATE else blocks for w in windows],  # states are few
            rows,
            budget,
            context,
            frozenset({EOS}),
            prefix_cache,
            policy=policy,
            # What is learned of the time of steps must not differ when an example runs again.
            clock=lambda: next(self.ticks),
            num_layers=num_layers,
            max_drafts=0 if STATE in windows else max_drafts,
        )
        self.executor = FakeExecutor(windows)
        self.requests: dict[str, Request] = {}
        self.alive: dict[str, Request] = {}
        self.num_steps = 0
        self.underway: tuple[StepPlan, StepOutput] | None = None
        """A plan ahead, which was executed before the one before it was committed."""

    def add(
        self, prompt: list[int], params: SamplingParams, handling: Handling = NO_WISHES
    ) -> Request:
        request = Request(str(len(self.requests)), list(prompt), params, handling=handling)
        self.scheduler.add(request)
        self.requests[request.id] = self.alive[request.id] = request
        return request

    def plan(self) -> StepPlan:
        held = {r.id for r in self.alive.values() if r.status is Status.RUNNING}
        plan = self.scheduler.plan()
        assert plan.num_tokens <= self.scheduler.max_step_tokens
        assert bool(plan.touched) == self.scheduler.has_work(), "work, but nothing planned"
        holding = {r.id: r for r in self.alive.values() if r.status is Status.RUNNING}
        moving = {item.request_id for item in plan.touched}
        assert moving <= set(holding)
        assert len({item.row for item in plan.touched}) == len(plan.touched)
        if self.scheduler.chunks.num_layers > 1:
            return plan  # others may stand still while a wave goes on
        for request in (holding[i] for i in set(holding) - moving):
            assert request.num_computed_tokens == request.kv.capacity, "has room and stands still"
        if not self.executor.lost_plan:
            assert not held & {start.request_id for start in plan.started}, "out and in again"
        return plan

    def commit(self, plan: StepPlan, output: StepOutput) -> list[RequestUpdate]:
        updates = self.scheduler.commit(plan, output)
        for update in updates:
            assert update.new_token_ids
            assert [-int(x.logprob) for x in update.logprobs] == update.new_token_ids
            assert update.finished == (update.request.status is Status.FINISHED)
            if update.finished:
                self.settle(update.request)
        return updates

    def settle(self, request: Request) -> None:
        del self.alive[request.id]
        prompt = request.token_ids[: request.num_prompt_tokens]
        expected, reason = answer(prompt, request.params, self.context)
        assert request.output_token_ids == expected
        assert request.finish_reason == reason

    def abort(self, request: Request) -> None:
        known = request.output_token_ids
        assert self.scheduler.abort(request.id)
        assert not self.scheduler.abort(request.id)
        del self.alive[request.id]
        assert request.finish_reason == "abort"
        prompt = request.token_ids[: request.num_prompt_tokens]
        assert answer(prompt, request.params, self.context)[0][: len(known)] == known

    def begin(self, ahead: bool = False) -> tuple[StepPlan, StepOutput]:
        """The step that is underway, or a new one; with `ahead` also the one behind it."""
        begun, self.underway = self.underway, None
        if begun is None:
            plan = self.plan()
            begun = plan, self.executor.execute(plan)
        # What is told of drafts must be known first.
        if ahead and not any(item.num_drafts for item in begun[0].items):
            self.go_ahead(begun[0])
        return begun

    def go_ahead(self, plan: StepPlan) -> None:
        follows = self.scheduler.plan_ahead()
        if follows is None:
            return
        ends = {item.request_id: item.start + item.num_tokens for item in plan.items}
        assert all(i.start == ends[i.request_id] and i.num_tokens == 1 for i in follows.items)
        assert not (follows.started or follows.loads or follows.copies or follows.wave)
        going = {item.request_id for item in follows.items}
        for request in self.alive.values():
            done = ends.get(request.id, 0) + 1 == request.max_total_tokens
            assert (request.id in going) == (request.status is Status.RUNNING and not done)
        self.underway = follows, self.executor.execute(follows)

    def step(self, ahead: bool = False) -> list[RequestUpdate]:
        begun = self.begin(ahead)
        self.num_steps += 1
        return self.commit(*begun)

    def finish_all(self) -> None:
        # Each step brings the oldest one token further, in the worst case nobody else; under other
        # policies the first does not stay the first (see test_liveness).
        bound = 2 * sum(len(r.token_ids) + r.params.max_tokens for r in self.alive.values())
        for _ in range(bound):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.alive and not self.scheduler.has_work(), "not done in the bounded time"
        if self.underway is not None:
            assert self.step() == []
        self.nothing_leaked()

    def nothing_leaked(self) -> None:
        self.scheduler.check()
        assert self.scheduler.kv_usage == 0.0
        for pool in self.scheduler.kv.pools:
            assert pool.num_free == pool.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


def params(max_tokens: int = 10, seed: int = 1, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, **more)  # type: ignore[arg-type]


# ---- the door --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "blocks", "field", "numbers"),
    [
        (0, 5, 64, "prompt", []),
        (100, 5, 64, "prompt", ["100", "99"]),
        (41, 5, 10, "prompt", ["41", "40"]),
        (40, 2, 10, "max_tokens", ["40", "1"]),
        (30, 60, 10, "max_tokens", ["30", "60", "40", "11"]),
    ],
)
def test_what_can_never_fit_is_refused(
    num_prompt: int, max_tokens: int, blocks: int, field: str, numbers: list[str]
) -> None:
    bench = Bench(blocks=blocks)
    with pytest.raises(InputError) as error:
        bench.add([1] * num_prompt, params(max_tokens))
    assert error.value.field == field
    assert all(number in str(error.value) for number in numbers)
    assert not bench.scheduler.has_work()


@pytest.mark.parametrize(
    ("windows", "blocks"), [((None,), 10), ((9,), 3), ((6,), 3), ((5,), 2), ((2,), 2), ((1,), 1)]
)
def test_what_just_fits_runs(windows: tuple[int | None, ...], blocks: int) -> None:
    bench = Bench(windows, blocks=blocks)
    bench.add([1] * 30, params(11, ignore_eos=True))
    bench.add([1] * 29, params(11, ignore_eos=True))
    bench.finish_all()
    if blocks > 1:
        with pytest.raises(InputError):
            Bench(windows, blocks=blocks - 1).add([1] * 30, params(11))


def test_an_id_in_use_is_refused_and_free_afterwards() -> None:
    bench = Bench()
    bench.add([1], params())
    with pytest.raises(InputError):
        bench.scheduler.add(Request("0", [1], params()))
    bench.finish_all()
    bench.scheduler.add(Request("0", [1], params()))


def test_the_context_ends_an_answer_but_a_cache_never_does() -> None:
    bench = Bench(context=20)
    request = bench.add([1] * 15, params(50, ignore_eos=True))
    bench.finish_all()
    assert request.num_tokens == 20 and request.finish_reason == "length"


# ---- one rule at a time ----------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_beside_decoding_rows() -> None:
    bench = Bench(budget=8)
    for _ in range(3):
        bench.add([9, 2], params(50, ignore_eos=True))
    bench.step()
    bench.add(list(range(1, 16)), params())
    spans = []
    for _ in range(3):
        plan = bench.plan()
        spans.append([(item.num_tokens, item.sample) for item in plan.items])
        bench.commit(plan, bench.executor.execute(plan))
    rows = [(1, True)] * 3
    assert spans == [[*rows, (5, False)], [*rows, (5, False)], [*rows, (5, True)]]


def test_an_old_prompt_that_comes_back_does_not_stall_younger_rows() -> None:
    bench = Bench(budget=5, prefix_cache=False)
    old = bench.add(list(range(1, 12)), params(20, ignore_eos=True))
    for _ in range(3):
        bench.add([1, 2], params(20, ignore_eos=True))
    while bench.scheduler.num_running < 4:
        bench.step()
    bench.step()
    bench.scheduler.preempt(old.id)
    plan = bench.plan()
    assert sorted(item.num_tokens for item in plan.items) == [1, 1, 1, 2]
    bench.commit(plan, bench.executor.execute(plan))
    assert sorted(item.num_tokens for item in bench.plan().items) == [1, 1, 1, 2]


def test_equal_prompts_share_and_report_it() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    first = bench.add(prompt, params())
    bench.step()
    second = bench.add(prompt, params(seed=2))
    plan = bench.plan()
    assert [item.num_tokens for item in plan.items] == [1, 1]
    assert plan.started[0].blocks[0] == first.kv.tables[0][:2]
    bench.commit(plan, bench.executor.execute(plan))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    bench.finish_all()


def test_a_preempted_request_keeps_its_tokens_and_its_place() -> None:
    bench = Bench(rows=2)
    requests = [bench.add([1, 2, 3, 4, 5], params(20, ignore_eos=True)) for _ in range(3)]
    bench.step()
    bench.step()
    bench.scheduler.preempt("0")
    assert requests[0].output_token_ids and requests[0].row == -1
    plan = bench.plan()
    assert [start.request_id for start in plan.started] == ["0"]
    assert plan.started[0].token_ids == requests[0].token_ids
    assert plan.released_rows == [plan.started[0].row]
    assert requests[0].num_cached_tokens == 0
    bench.commit(plan, bench.executor.execute(plan))
    bench.finish_all()
    assert requests[0].num_preemptions == 1
    assert plan.started[0].token_ids == requests[0].token_ids[:7], "the plan changed afterwards"


def test_when_blocks_run_out_the_youngest_goes_and_nobody_overtakes() -> None:
    bench = Bench(blocks=12)
    for index in range(5):
        bench.add([1 + index] * 5, params(30, seed=index, ignore_eos=True))
    order = []
    while bench.scheduler.has_work():
        order += [u.request.order for u in bench.step() if u.finished]
        bench.scheduler.check()
    assert bench.scheduler.num_preemptions > 0
    assert order == sorted(order)
    bench.nothing_leaked()


def test_abort_and_preempt_between_plan_and_commit() -> None:
    bench = Bench()
    gone, back, stays = [bench.add([s, 2, 3, 4, 5], params(seed=s)) for s in range(3)]
    plan = bench.plan()
    output = bench.executor.execute(plan)
    bench.abort(gone)
    bench.scheduler.preempt(back.id)
    bench.scheduler.add(Request(gone.id, [9], params()))
    updates = bench.commit(plan, output)
    assert [update.request for update in updates] == [stays]
    assert gone.output_token_ids == back.output_token_ids == []
    bench.scheduler.check()
    bench.scheduler.abort(gone.id)
    bench.finish_all()


def test_a_lost_plan_is_planned_again() -> None:
    bench = Bench()
    gone, stays = [bench.add([s, 2, 3, 4, 5], params(seed=s)) for s in range(2)]
    bench.step()
    bench.abort(gone)
    lost = bench.plan()
    assert lost.released_rows == [0]
    plan = bench.scheduler.plan()
    assert plan.released_rows == [0, 1]
    (start,) = plan.started
    assert start.token_ids == stays.token_ids and start.blocks == [stays.kv.tables[0][:1]]
    bench.commit(plan, bench.executor.execute(plan))
    bench.finish_all()


def test_finish_from_outside() -> None:
    bench = Bench()
    request = bench.add([1, 2], params(50, ignore_eos=True))
    bench.step()
    assert bench.scheduler.finish(request.id)
    assert not bench.scheduler.finish(request.id)
    assert request.finish_reason == "stop" and request.status is Status.FINISHED
    # An empty plan says nothing, so the engine may drop it; the next one tells.
    assert bench.scheduler.plan() == StepPlan()
    bench.add([1, 2], params())
    assert bench.scheduler.plan().released_rows == [0]


def test_stop_ids_count_even_when_eos_is_ignored() -> None:
    for seed in range(20):
        bench = Bench(blocks=200, context=1000)
        request = bench.add([1], params(400, seed=seed, ignore_eos=True, stop_token_ids=(3,)))
        bench.finish_all()
        assert request.token_ids[-1] == 3 and 3 not in request.output_token_ids[:-1]


def test_several_tokens_a_row_are_booked_up_to_the_end() -> None:
    """Drafts: a span of known tokens and drafts, of which a part was accepted."""
    bench = Bench()
    scheduler = bench.scheduler
    request = bench.add([5, 5, 5, 5, 5], params(8, stop_token_ids=(6,)))
    bench.step()
    del request.token_ids[5:]
    request.token_ids.append(4)
    for sampled, computed, known in (([1, 2], 7, 8), ([1], 8, 9), ([1, 6, 2, 3], 11, 11)):
        plan = scheduler.plan()
        logprobs = [TokenLogprobs(0.0, []) for _ in sampled]
        (update,) = scheduler.commit(plan, StepOutput([sampled], [logprobs]))
        assert (request.num_computed_tokens, request.num_tokens) == (computed, known)
    assert update.new_token_ids == [1, 6] and len(update.logprobs) == 2
    assert request.finish_reason == "stop"
    bench.nothing_leaked()


# ---- everything at once ----------------------------------------------------------------------

WINDOWS = [(None,), (6,), (None, 6), (None, 1), (None, 4, 11), (None, STATE), (None, 6, STATE)]
BEGINNINGS = [[1, 2, 3, 4, 5, 6, 1, 2], [1, 2, 3, 4, 6, 5, 4, 3, 2, 1, 2, 3, 4, 5], [6] * 20]

prompts = st.builds(
    lambda beginning, length, end: beginning[:length] + end,
    st.sampled_from(BEGINNINGS),
    st.integers(0, 20),
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
)
sampling = st.builds(
    params,
    max_tokens=st.integers(1, 25),
    seed=st.integers(1, 9),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (3,)]),
)


POLICIES: list[Policy] = [FirstCome(), Priority(0.001), Fair(), Deadline()]

handlings = st.builds(
    Handling,
    tenant=st.sampled_from("ab"),
    service=st.sampled_from(["interactive", "batch"]),
    priority=st.integers(0, 2),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(POLICIES),
        windows=st.sampled_from(WINDOWS),
        blocks=st.integers(9, 30),
        rows=st.integers(1, 6),
        budget=st.sampled_from([1, 2, 3, 7, 16, 64]),
        prefix_cache=st.booleans(),
        max_drafts=st.sampled_from([0, 0, 1, 3, 9]),
    )
    def start(
        self,
        policy: Policy,
        windows: tuple[int | None, ...],
        blocks: int,
        rows: int,
        budget: int,
        prefix_cache: bool,
        max_drafts: int,
    ) -> None:
        self.bench = Bench(
            *(windows, blocks, rows, budget, 32, prefix_cache, policy), max_drafts=max_drafts
        )

    @rule(prompt=prompts, sampling=sampling, handling=handlings)
    def add(self, prompt: list[int], sampling: SamplingParams, handling: Handling) -> None:
        self.bench.add(prompt, sampling, handling)

    @rule(ahead=st.booleans())
    def step(self, ahead: bool) -> None:
        self.bench.step(ahead)

    @rule(data=st.data(), ahead=st.booleans())
    def step_disturbed(self, data: st.DataObject, ahead: bool) -> None:
        """Cancels and preemptions between plan and commit."""
        begun = self.bench.begin(ahead)
        self._disturb(data)
        self.bench.commit(*begun)

    @precondition(lambda self: self.bench.alive)
    @rule(data=st.data())
    def disturb(self, data: st.DataObject) -> None:
        self._disturb(data)

    def _disturb(self, data: st.DataObject) -> None:
        bench = self.bench
        for request in list(bench.alive.values()):
            action = data.draw(st.sampled_from(["", "", "abort", "preempt"]))
            if action == "abort":
                bench.abort(request)
            elif action == "preempt":
                bench.scheduler.preempt(request.id)

    @rule(executed=st.booleans())
    def fail(self, executed: bool) -> None:
        """The runner fails: the plan is never committed, perhaps not even seen; nor is one that was
        underway."""
        self.bench.executor.lost_plan |= self.bench.underway is not None
        self.bench.underway = None
        plan = self.bench.plan()
        self.bench.executor.lost_plan = True
        if executed:
            self.bench.executor.execute(plan)

    @rule()
    def fail_before_one_ahead(self) -> None:
        """A step fails when the next is on its way already, which does not."""
        self.bench.begin(ahead=True)
        self.bench.executor.lost_plan = True
        if self.bench.underway is not None:
            assert self.bench.step() == []

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "bench"):
            self.bench.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.finish_all()


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None
)
TestScheduler = SchedulerMachine.TestCase


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    windows=st.sampled_from(WINDOWS),
    blocks=st.integers(8, 40),
    rows=st.integers(1, 8),
    budget=st.integers(1, 40),
)
# A victim whose blocks were still cached came back in the step that preempted it.
@example(seed=354, windows=(None,), blocks=8, rows=3, budget=16)
def test_nobody_overtakes_the_oldest(
    seed: int, windows: tuple[int | None, ...], blocks: int, rows: int, budget: int
) -> None:
    """The oldest alive computes, or nobody starts: but for the few steps in which it waits for what
    another is computing, and that in which it was preempted."""
    rng = random.Random(seed)
    bench = Bench(windows, blocks, rows, budget, 32)
    for _ in range(40):
        if rng.random() < 0.4:
            prompt = [*rng.choice(BEGINNINGS)[: rng.randrange(20)], rng.randrange(VOCAB)]
            bench.add(prompt, params(rng.randint(1, 20), rng.randint(1, 5)))
        if bench.alive:
            oldest = next(iter(bench.alive.values()))
            patience, preemptions = oldest.patience, oldest.num_preemptions
            plan = bench.plan()
            put_off = oldest.patience < patience or oldest.num_preemptions > preemptions
            if not put_off and oldest.id not in {item.request_id for item in plan.items}:
                assert not plan.started
            bench.commit(plan, bench.executor.execute(plan))
    bench.finish_all()


@pytest.mark.parametrize(("max_drafts", "ahead"), [(0, False), (5, False), (0, True)])
@pytest.mark.parametrize("windows", WINDOWS)
def test_a_thousand_requests_leak_nothing(
    windows: tuple[int | None, ...], max_drafts: int, ahead: bool
) -> None:
    rng = random.Random(7)
    blocks = 24 if None in windows else 6
    bench = Bench(windows, blocks, rows=6, budget=12, context=32, max_drafts=max_drafts)
    num_ahead = 0
    while len(bench.requests) < 1000 or bench.alive:
        if len(bench.requests) < 1000 and len(bench.alive) < 12 and rng.random() < 0.7:
            prompt = [*rng.choice(BEGINNINGS)[: rng.randrange(20)], rng.randrange(VOCAB)]
            bench.add(prompt, params(rng.randint(1, 20), rng.randint(1, 5)))
        begun = bench.begin(ahead)
        num_ahead += bench.underway is not None
        if bench.alive and rng.random() < 0.1:
            bench.abort(rng.choice(list(bench.alive.values())))
        bench.commit(*begun)
        if bench.alive and rng.random() < 0.1:
            bench.abort(rng.choice(list(bench.alive.values())))
    bench.nothing_leaked()
    assert bool(num_ahead) == (ahead and STATE not in windows)
    assert bench.scheduler.num_preemptions > 0 or max_drafts or ahead
    assert any(request.num_cached_tokens for request in bench.requests.values())


def test_what_a_plan_is_yet_to_copy_is_not_found() -> None:
    """y begins amid a cached block in the place of x1, which frees its tenant's budget, so that x0 takes
    its place in the same plan. That is lost: the copy for y was never made."""
    now = [0.0]
    scheduler = Scheduler(
        *([spec(None)], [40], 1, 64, 100, frozenset({EOS})),
        policy=Priority(1.0),
        tenants={"x": TenantLimits(max_running=1)},
        clock=lambda: now[0],
    )
    executor = FakeExecutor((None,))

    def add(name: str, prompt: list[int], tenant: str, priority: int) -> None:
        now[0] += 0.001
        handling = Handling(tenant, priority=priority)
        scheduler.add(Request(name, prompt, params(30, ignore_eos=True), handling=handling))

    def step() -> None:
        plan = scheduler.plan()
        scheduler.commit(plan, executor.execute(plan))

    beginning = list(range(1, 11))
    add("first", beginning, "y", 0)
    for _ in range(31):
        step()
    assert not scheduler.has_work()
    add("x1", [15] * 9, "x", 0)
    for _ in range(3):
        step()
    add("y", [*beginning[:6], 12, 13, 14], "y", 5)
    add("x0", [16] * 9, "x", 50)
    plan = scheduler.plan()
    assert [start.request_id for start in plan.started] == ["y", "x0"] and plan.copies
    [copy] = plan.copies
    node = scheduler.kv.pools[0].node(copy.target)
    assert node is None
