"""Whatever is admitted finishes: all small cases, one after another, under every policy.

A case is a few requests (prompt, answer, arrival, tenant, service, priority) on a pool that holds
little more than the largest of them. Each is run to its end within a bound of steps, and no request
is preempted twice without progress in between, but by the two exceptions of docs/design/022.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import pytest

from elinvar.base.handling import Handling, Service
from elinvar.base.limits import TenantLimits
from elinvar.base.plan import StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.kv.sequence import Prefix
from elinvar.sched.policy import Deadline, Fair, FirstCome, Policy, Priority
from elinvar.sched.request import Request, Status
from elinvar.sched.scheduler import Scheduler
from test_scheduler import SIZE, STATE, spec

POLICIES = {"fcfs": FirstCome(), "priority": Priority(2.0), "fair": Fair(), "deadline": Deadline()}


@dataclass(frozen=True)
class Ask:
    arrival: int
    """Before which step it comes."""
    prompt: int
    answer: int
    tenant: str = "a"
    service: Service = "interactive"
    priority: int = 0
    window: int | None = None

    def request(self, index: int) -> Request:
        params = SamplingParams(self.answer, seed=1, ignore_eos=True, attention_window=self.window)
        handling = Handling(self.tenant, self.service, self.priority)
        prompt = [index * 100 + i for i in range(self.prompt)]
        return Request(str(index), prompt, params, handling=handling)


@dataclass(frozen=True)
class Machine:
    blocks: int
    rows: int
    budget: int
    windows: tuple[int | None, ...] = (None,)

    def scheduler(self, policy: Policy, **options: object) -> Scheduler:
        specs = [spec(window) for window in self.windows]
        blocks = [2 if window == STATE else self.blocks for window in self.windows]
        eos: frozenset[int] = frozenset()
        return Scheduler(specs, blocks, self.rows, self.budget, 100, eos, policy=policy, **options)  # type: ignore[arg-type]


class Run:
    """Steps are seconds."""

    def __init__(self, machine: Machine, policy: Policy, asks: Sequence[Ask], **options: object):
        self.step = 0
        self.scheduler = machine.scheduler(policy, clock=lambda: float(self.step), **options)
        self.asks = asks
        self.requests: list[Request] = []
        self.jams = 0
        self.seen: dict[Request, tuple[int, int]] = {}
        """Of each request: how often it was preempted, and how far it was then."""

    def to_the_end(self, abort: int = -1, abort_step: int = -1) -> None:
        tokens = sum(ask.prompt + ask.answer for ask in self.asks)
        # Found by trying: 3/4 of the tokens is the most.
        bound = 2 * tokens + max(ask.arrival for ask in self.asks)
        arrivals = sorted(enumerate(self.asks), key=lambda pair: pair[1].arrival)
        while arrivals or self.scheduler.has_work():
            while arrivals and arrivals[0][1].arrival <= self.step:
                index, ask = arrivals.pop(0)
                self.requests.append(ask.request(index))
                self.scheduler.add(self.requests[-1])
            plan = self.scheduler.plan()
            self._no_storm(plan)
            if self.step == abort_step:
                self.scheduler.abort(str(abort))
            sampled = [[7] if item.sample else [] for item in plan.items]
            self.scheduler.commit(plan, StepOutput(sampled, [[] for _ in sampled]))
            self.step += 1
            assert self.step <= bound, "does not end"
        self.scheduler.check()
        assert self.scheduler.kv_usage == 0
        for request in self.requests:
            assert request.status is Status.FINISHED

    def _no_storm(self, plan: StepPlan) -> None:
        """Exceptions: batch requests give way to interactive ones, and of those that all need a
        block the first goes on."""
        started = {start.request_id for start in plan.started}
        yielded = any(r.id in started and not r.is_batch for r in self.requests)
        jams = self.scheduler.preemptions["jam"]
        jam, self.jams = jams > self.jams, jams
        for request in self.requests:
            count, reached = request.num_preemptions, request.num_reached_tokens
            seen, was = self.seen.get(request, (0, -1))
            assert count == seen or reached > was or jam or (request.is_batch and yielded), (
                "preempted in vain"
            )
            self.seen[request] = count, reached


def machines() -> Iterator[Machine]:
    """Pools that hold the longest of the requests below, and hardly more."""
    for blocks, rows, budget in product((3, 4), (1, 2, 3), (3, 8)):
        if rows <= budget:
            yield Machine(blocks, rows, budget)


SHAPES = [(1, 11), (5, 4), (9, 3)]
KINDS: list[tuple[str, Service, int]] = [
    ("a", "interactive", 0),
    ("b", "interactive", 1),
    ("b", "batch", 0),
]


def asks(arrivals: Sequence[int]) -> Iterator[Ask]:
    for arrival, shape, (tenant, service, priority) in product(arrivals, SHAPES, KINDS):
        yield Ask(arrival, *shape, tenant, service, priority)


@pytest.mark.parametrize("policy", POLICIES)
def test_three_requests_end(policy: str) -> None:
    machine = Machine(blocks=3, rows=3, budget=8)
    for case in product(asks([0]), asks([0, 2]), asks([1])):
        Run(machine, POLICIES[policy], case).to_the_end()


@pytest.mark.parametrize("policy", POLICIES)
def test_two_requests_end_on_all_machines(policy: str) -> None:
    for machine, *case in product(machines(), asks([0]), asks([0, 2, 5])):
        Run(machine, POLICIES[policy], case).to_the_end()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_others_end_when_one_is_cancelled_between_plan_and_commit(policy: str) -> None:
    machine = Machine(blocks=3, rows=2, budget=4)
    cancels = product(range(2), range(1, 12, 2))
    for case, cancel in product(product(asks([0]), asks([0, 2])), cancels):
        Run(machine, POLICIES[policy], case).to_the_end(*cancel)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("windows", [(None, 6), (None, STATE)])
def test_other_kinds_of_layers(policy: str, windows: tuple[int | None, ...]) -> None:
    machine = Machine(blocks=4, rows=3, budget=5, windows=windows)
    for case in product(asks([0]), asks([0]), asks([2])):
        Run(machine, POLICIES[policy], case).to_the_end()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("windows", [(None,), (None, STATE)])
def test_requests_that_forget_outgrow_the_pool(
    policy: str, windows: tuple[int | None, ...]
) -> None:
    """They keep two blocks, and the one that they write."""
    for blocks in (3, 4):
        machine = Machine(blocks, 3, 5, windows)
        forgets = [Ask(0, 25, 20, kind, service, priority, 1) for kind, service, priority in KINDS]
        for case in product(forgets, asks([3]), forgets):
            Run(machine, POLICIES[policy], case).to_the_end()


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_rates_and_numbers_delay_and_stop_nobody(policy: str) -> None:
    machine = Machine(blocks=4, rows=3, budget=5)
    limits = {"a": TenantLimits(tokens_per_s=2.0, burst_s=1.0), "*": TenantLimits(max_running=1)}
    for case in product(asks([0]), asks([0]), asks([2])):
        Run(machine, POLICIES[policy], case, tenants=limits).to_the_end()


def careless(scheduler: Scheduler) -> None:
    """Admit whoever finds a block: what follows is more preemption than ever."""

    def fits(request: Request, prefix: Prefix, *others: object) -> bool:
        start = prefix.num_tokens
        return scheduler.kv.prepare(request.kv, start, start + 1, prefix) is not None

    scheduler.room.fits = fits  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", POLICIES)
def test_liveness_does_not_rest_on_careful_admission(policy: str) -> None:
    shapes = list(product((4, 7, 11), (6, 9, 16)))
    jams = 0
    for blocks, arrivals in product((5, 7), ((0, 0, 0), (0, 2, 6))):
        for case in product(shapes, repeat=3):
            most = blocks * SIZE + 1
            these = [
                Ask(arrival, prompt, min(answer, most - prompt), tenant, priority=i % 2)
                for i, (arrival, (prompt, answer), tenant) in enumerate(
                    zip(arrivals, case, "aba", strict=True)
                )
            ]
            run = Run(Machine(blocks, 3, 8), POLICIES[policy], these)
            careless(run.scheduler)
            run.to_the_end()
            jams += run.jams
    assert jams, "the last resort was not tried"
