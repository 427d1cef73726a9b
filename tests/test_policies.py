"""Policies, tenants' budgets and the cutting of prompts on a simulated machine: the real scheduler,
and a clock that each step moves by what it would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from elinvar.base.config import EngineConfig, KVSpec
from elinvar.base.errors import InputError, QueueFullError
from elinvar.base.handling import NO_WISHES, Handling
from elinvar.base.limits import BATCH, INTERACTIVE, Target, TenantLimits
from elinvar.base.plan import PlanItem, StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.sched.policy import Deadline, Fair, FirstCome, Policy, Priority, make_policy
from elinvar.sched.request import Request, Status
from elinvar.sched.scheduler import UNLIMITED, Scheduler

BLOCK = 32


@dataclass
class Costs:
    """Seconds of a step: to read the weights, of a row, of a prompt's token, of each 1,000 it sees."""

    base: float = 0.010
    row: float = 0.0005
    token: float = 0.0005
    deep: float = 0.0001
    deep_row: float | None = None
    """The last of a row that samples, where it is another."""
    noise: float = 0.0
    layers: tuple[float, ...] = (1.0,)
    """What of a prompt's token falls to each layer, together 1."""

    def seconds(self, plan: StepPlan, rng: Random) -> tuple[float, list[float]]:
        """Of the step, and of the layers that its wave goes through."""
        seconds = self.base + self._of(plan.items)
        noise = 1 + self.noise * rng.random()
        wave, layer_s = plan.wave, []
        if wave is not None:
            all_s = self._of(wave.items)
            layer_s = [noise * all_s * share for share in self.layers[wave.first : wave.end]]
        return seconds * noise + sum(layer_s), layer_s

    def _of(self, items: list[PlanItem]) -> float:
        seconds = 0.0
        for item in items:
            each, deep = self.token, self.deep
            if item.sample and item.num_tokens == 1:
                each, deep = self.row, self.deep if self.deep_row is None else self.deep_row
            seconds += item.num_tokens * (each + deep * item.start / 1000)
        return seconds


@dataclass
class Simulation:
    policy: Policy = field(default_factory=FirstCome)
    blocks: int = 2000
    rows: int = 16
    budget: int = 512
    tenants: dict[str, TenantLimits] = field(default_factory=dict)
    interactive: Target = UNLIMITED
    batch: Target = UNLIMITED
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        self.now = 0.0
        self.rng = Random(1)
        self.num_added = 0
        self.scheduler = Scheduler(
            [KVSpec("full", (0,), 1, 8)],
            [self.blocks],
            self.rows,
            self.budget,
            100_000,
            frozenset(),
            False,
            clock=lambda: self.now,
            policy=self.policy,
            tenants=self.tenants,
            interactive=self.interactive,
            batch=self.batch,
            num_layers=len(self.costs.layers),
        )

    def add(self, prompt: int, answer: int, handling: Handling = NO_WISHES) -> Request:
        params = SamplingParams(answer, seed=1, ignore_eos=True)
        request = Request(str(self.num_added), [1] * prompt, params, handling=handling)
        self.scheduler.add(request)
        self.num_added += 1
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        if not plan.touched:
            self.now += self.scheduler.idle_s
            return plan
        seconds, layer_s = self.costs.seconds(plan, self.rng)
        self.now += seconds
        sampled = [[7] if item.sample else [] for item in plan.results]
        output = StepOutput(sampled, [[] for _ in sampled], layer_s=layer_s)
        self.scheduler.commit(plan, output)
        return plan

    def until(self, done: Callable[[], bool], most: int = 20_000) -> None:
        for _ in range(most):
            if done():
                return
            self.step()
        raise AssertionError("not done in the bounded time")

    def finish(self) -> None:
        self.until(lambda: not self.scheduler.has_work())
        self.scheduler.check()


def ttft(request: Request) -> float:
    assert request.first_token is not None
    return request.first_token - request.arrival


def of(tenant: str, service: str = "interactive", priority: int = 0) -> Handling:
    return Handling(tenant, service, priority)  # type: ignore[arg-type]


# ---- between tenants -------------------------------------------------------------------------


def beside_a_greedy_tenant(policy: Policy, rows: int, blocks: int) -> list[float]:
    """TTFTs of one who asks now and then, beside one who asked for a hundred answers at once."""
    sim = Simulation(policy, rows=rows, blocks=blocks)
    for _ in range(100):
        sim.add(400, 200, of("greedy"))
    asked: list[Request] = []
    while sim.scheduler.has_work():
        if sim.now >= 2 * len(asked) + 1 and len(asked) < 20:
            asked.append(sim.add(400, 20, of("modest")))
        sim.step()
    sim.scheduler.check()
    return sorted(ttft(request) for request in asked)


@pytest.mark.parametrize(("rows", "blocks"), [(16, 1000), (8, 1000), (64, 100)])
def test_a_greedy_tenant_cannot_keep_another_waiting(rows: int, blocks: int) -> None:
    """Short of rows, and short of memory."""
    alone = Simulation()
    request = alone.add(400, 20)
    alone.finish()
    fair_share = 2 * ttft(request)
    assert beside_a_greedy_tenant(FirstCome(), rows, blocks)[-2] > 10 * fair_share
    assert beside_a_greedy_tenant(Fair(), rows, blocks)[-2] <= 2 * fair_share


def test_busy_tenants_are_served_by_their_weights() -> None:
    sim = Simulation(Fair(), rows=4, tenants={"a": TenantLimits(weight=3.0)})
    requests = [sim.add(100, 50, of("ab"[i % 2])) for i in range(200)]
    while sum(r.status is Status.FINISHED for r in requests) < 100:
        sim.step()
    ended = [r.handling.tenant for r in requests if r.status is Status.FINISHED]
    assert 2.5 <= ended.count("a") / ended.count("b") <= 3.5


def test_who_was_away_saved_nothing_up() -> None:
    sim = Simulation(Fair(), rows=4)
    for _ in range(40):
        sim.add(100, 50, of("a"))
    sim.until(lambda: sim.scheduler.num_waiting < 20)
    late = [sim.add(100, 50, of("b")) for _ in range(20)]
    sim.until(lambda: late[9].status is Status.FINISHED)
    ended = sum(r.status is Status.FINISHED for r in sim.scheduler._roster.requests.values())
    assert ended == 0
    # Half of the machine since they came, not all of it until they caught up.
    assert 5 <= sim.scheduler.num_waiting - sum(r.status is Status.WAITING for r in late) <= 15


def test_a_rate_holds_on_average_and_holds_up_nobody_else() -> None:
    sim = Simulation(tenants={"slow": TenantLimits(tokens_per_s=100.0, burst_s=2.0)})
    slow = [sim.add(90, 10, of("slow")) for _ in range(20)]
    other = sim.add(90, 10, of("other"))
    sim.until(lambda: other.status is Status.FINISHED)
    assert ttft(other) < 1
    sim.finish()
    # 200 at once, the rest at 100 a second; what begins in one step may do so on credit.
    spent = 20 * (90 + 10 - 1)
    assert (spent - 200 - 512) / 100 <= max(ttft(r) for r in slow) <= (spent - 200) / 100 + 1
    assert sim.scheduler.num_held_up > 1


def test_no_more_of_a_tenant_run_than_may() -> None:
    sim = Simulation(tenants={"*": TenantLimits(max_running=2)})
    for tenant in "aaaaabb":
        sim.add(10, 5, of(tenant))
    sim.step()
    assert sim.scheduler.num_running == 4
    sim.finish()


@pytest.mark.parametrize("policy", [FirstCome(), Fair()])
def test_a_full_queue_says_when_its_work_will_be_done(policy: Policy) -> None:
    sim = Simulation(policy, rows=4, tenants={"a": TenantLimits(max_waiting=20)})
    for tenant in "ab":
        for _ in range(4):
            sim.add(100, 100, of(tenant))
    sim.finish()
    for tenant in "ab":
        for _ in range(20):
            sim.add(100, 100, of(tenant))
    sim.until(lambda: sim.now > 1 and sim.scheduler.num_waiting < 36)
    with pytest.raises(QueueFullError) as error:
        for _ in range(25):
            sim.add(100, 100, of("a"))
    asked = sim.now
    sim.until(lambda: not any(r.handling.tenant == "a" for r in sim.scheduler.tenants))
    assert 0.5 <= error.value.retry_after_s / (sim.now - asked) <= 2


@pytest.mark.parametrize(
    ("limits", "rows", "most"),
    [
        (TenantLimits(max_running=4, max_waiting=0), 8, 4),
        (TenantLimits(max_running=1, max_waiting=1), 8, 2),
        (TenantLimits(max_waiting=0), 3, 3),
        (TenantLimits(max_waiting=2), 3, 5),
    ],
)
def test_those_who_may_begin_do_not_count_as_waiting(
    limits: TenantLimits, rows: int, most: int
) -> None:
    """Whether they come at once or one after the other."""
    for steps in (0, 1):
        sim = Simulation(rows=rows, tenants={"*": limits})
        for _ in range(most):
            sim.add(10, 50)
            for _ in range(steps):
                sim.step()
        with pytest.raises(QueueFullError):
            sim.add(10, 50)
        sim.finish()


# ---- by priority, by deadline, by service ----------------------------------------------------


def test_priority_goes_first_and_age_counts() -> None:
    """Beside a machine that is always busy with others of a higher level: what waits grows older, and
    those that come a level's worth of seconds later do not pass it."""
    ageing_s, levels = 2.0, 3
    sim = Simulation(Priority(ageing_s), rows=2)
    lowly = sim.add(100, 20, of("", priority=0))
    stream = [sim.add(100, 20, of("", priority=levels)) for _ in range(4)]
    while lowly.status is not Status.FINISHED:
        if sum(r.status is Status.WAITING for r in stream) < 4:
            stream.append(sim.add(100, 20, of("", priority=levels)))
        sim.step()
        assert sim.now < 60, "starves"
    longest = max(r.finished - r.arrival for r in stream if r.finished is not None)
    assert lowly.num_preemptions <= 1
    assert ageing_s * levels / 2 <= ttft(lowly) <= ageing_s * levels + longest


def test_a_higher_level_takes_the_place_of_a_lower_one() -> None:
    sim = Simulation(Priority(100.0), rows=1)
    low = sim.add(10, 50, of("", priority=0))
    sim.step()
    high = sim.add(10, 5, of("", priority=1))
    equal = sim.add(10, 5, of("", priority=0))
    plan = sim.step()
    assert [start.request_id for start in plan.started] == [high.id]
    assert sim.scheduler.preemptions["yield"] == low.num_preemptions == 1
    sim.finish()
    assert low.finished is not None and equal.finished is not None
    assert low.finished < equal.finished


def test_the_least_slack_goes_first() -> None:
    sim = Simulation(Deadline(), rows=1)
    first = sim.add(100, 5)
    sim.until(lambda: first.status is Status.FINISHED)
    running = sim.add(100, 20)
    sim.step()
    short, long = sim.add(10, 5), sim.add(1500, 5)
    sim.finish()
    assert running.finished < long.finished < short.finished  # type: ignore[operator]


@pytest.mark.parametrize("policy", [FirstCome(), Priority(1.0), Fair(), Deadline()])
def test_batch_yields_at_once_and_fills_what_is_left(policy: Policy) -> None:
    sim = Simulation(policy, rows=2, blocks=12)
    batch = [sim.add(100, 60, of("b", "batch")) for _ in range(3)]
    sim.until(lambda: all(r.num_tokens > 105 for r in batch[:2]))
    now = [sim.add(100, 30, of("a")) for _ in range(2)]
    plan = sim.step()
    assert {start.request_id for start in plan.started} == {r.id for r in now}
    assert sim.scheduler.preemptions["yield"] == 2
    late = sim.add(100, 30, of("a"))
    sim.until(lambda: late.status is Status.FINISHED)
    assert all(r.status is Status.FINISHED for r in now)
    assert not any(r.status is Status.FINISHED for r in batch)
    sim.finish()


def test_a_prompt_of_batch_leaves_its_budget_to_one_who_waits() -> None:
    sim = Simulation(rows=4)
    batch = sim.add(5000, 5, of("", "batch"))
    sim.step()
    quick = sim.add(500, 5)
    plan = sim.step()
    assert {item.request_id: item.num_tokens for item in plan.items} == {
        quick.id: 500,
        batch.id: 12,
    }
    sim.finish()


def test_every_name_of_a_policy_makes_one() -> None:
    kinds = {"fcfs": FirstCome, "priority": Priority, "fair": Fair, "deadline": Deadline}
    for name, kind in kinds.items():
        assert type(make_policy(EngineConfig(policy=name))) is kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: EngineConfig(policy="lifo"), "policy"),  # type: ignore[arg-type]
        (lambda: EngineConfig(ageing_s=0), "ageing_s"),
        (lambda: TenantLimits(weight=-1), "weight"),
        (lambda: TenantLimits(tokens_per_s=float("nan")), "tokens_per_s"),
        (lambda: TenantLimits(burst_s=True), "burst_s"),
        (lambda: TenantLimits(max_running=0), "max_running"),
        (lambda: TenantLimits(max_waiting=1.5), "max_waiting"),  # type: ignore[arg-type]
        (lambda: Target(0, "auto"), "ttft_s"),
        (lambda: Target(1, "soon"), "itl_s"),  # type: ignore[arg-type]
    ],
)
def test_what_is_out_of_range_is_refused_by_name(make: Callable[[], object], name: str) -> None:
    with pytest.raises(InputError, match=name) as error:
        make()
    assert error.value.field == name


# ---- prompts are cut -------------------------------------------------------------------------


def intervals(sim: Simulation, prompt: int) -> tuple[float, list[float]]:
    """Seconds of a quiet step of four streams, and of those beside a prompt until its first token."""
    for _ in range(4):
        sim.add(10, 6000)
    for _ in range(20):
        sim.step()
    before = sim.now
    sim.step()
    quiet = sim.now - before
    long = sim.add(prompt, 10)
    steps = []
    while long.first_token is None:
        before = sim.now
        sim.step()
        steps.append(sim.now - before)
    return quiet, steps


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("deep", [0.0, 0.00003, 0.0001])
def test_prompts_are_cut_so_that_streams_keep_their_pace(deep: float, noise: float) -> None:
    costs = Costs(deep=deep, noise=noise)
    quiet, steps = intervals(Simulation(interactive=INTERACTIVE, costs=costs), 16_000)
    _, unlimited = intervals(Simulation(costs=costs), 16_000)
    late = sorted(steps[10:])
    assert late[int(0.99 * len(late))] <= 2 * (1 + noise) * quiet
    # And no shorter than they need be: most of the target is used.
    assert late[len(late) // 2] >= 1.5 * quiet
    assert max(steps) <= 2.5 * (1 + noise) * quiet < max(unlimited) / 3


def test_all_together_takes_no_longer_when_prompts_are_cut() -> None:
    spans = []
    for target in (INTERACTIVE, UNLIMITED):
        sim = Simulation(interactive=target)
        intervals(sim, 16_000)
        sim.finish()
        spans.append(sim.now)
    assert spans[0] <= spans[1] / 0.9


def test_a_lone_prompt_is_not_cut_nor_one_beside_batch() -> None:
    sim = Simulation(interactive=INTERACTIVE, batch=BATCH)
    sim.add(2000, 5)
    assert sim.step().num_tokens == 512
    sim.finish()
    sim.add(10, 50, of("", "batch"))
    sim.step()
    sim.add(2000, 5, of("", "batch"))
    assert sim.step().num_tokens == 512


def test_a_target_in_seconds_and_one_that_cannot_be_had() -> None:
    for target, least, most in ((0.05, 0.03, 0.055), (0.001, 0.0, 0.018)):
        _, steps = intervals(Simulation(interactive=Target(1.0, target)), 2000)
        assert least <= sorted(steps)[len(steps) // 2] <= most


def test_the_quiet_step_is_measured_again() -> None:
    """The machine gets slower amid a prompt: the target of `auto` moves with it."""
    sim = Simulation(blocks=3000, interactive=INTERACTIVE)
    for _ in range(4):
        sim.add(10, 5000)
    for _ in range(20):
        sim.step()
    sim.add(50_000, 10)
    for _ in range(100):
        sim.step()
    sim.costs = Costs(base=0.040, row=0.002, token=0.002)
    spans = []
    for _ in range(700):
        before = sim.now
        sim.step()
        spans.append(sim.now - before)
    assert 0.06 <= sorted(spans[500:])[100] <= 0.096


def test_a_first_token_does_not_wait_for_other_prompts() -> None:
    """Nobody decodes, but who gets a first token gets it when the step's other prompts are done."""
    sim = Simulation(interactive=INTERACTIVE)
    sim.add(100, 5)
    sim.finish()
    short, long = sim.add(50, 5), sim.add(2000, 5)
    plan = sim.step()
    spans = {item.request_id: item.num_tokens for item in plan.items}
    assert spans[short.id] == 50 and 1 <= spans[long.id] <= 30
    sim.finish()
    assert ttft(short) < 0.06
