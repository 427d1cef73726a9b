"""Prompts cut by layers: the same bits, nothing written into blocks that were given back, and streams
that keep their pace where one token of a prompt takes longer than they should wait."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from adapters import adapted_engine
from elinvar.base.limits import INTERACTIVE
from elinvar.base.plan import PlanItem, StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.base.thinking import ThinkingBudget
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.sched.policy import Fair, Policy
from elinvar.sched.request import Request, Status
from elinvar.sched.scheduler import UNLIMITED, Scheduler
from engines import Answer, answers, provider, tiny_engine, tiny_model
from helpers import Span, make_batch, make_cache
from test_invariance import GRAMMAR, PARAMS, PROMPTS, expected, prompt
from test_policies import Costs, Simulation, intervals, of, ttft
from test_scheduler import (
    BEGINNINGS,
    POLICIES,
    SIZE,
    STATE,
    VOCAB,
    WINDOWS,
    Bench,
    FakeExecutor,
    Row,
    SchedulerMachine,
    params,
)

NAMES = [family.name for family in REGISTRY]
EVERY = SamplingParams(max_tokens=60, temperature=0.9, seed=4, logprobs=2, ignore_eos=True)


def force(scheduler: Scheduler, limits: Callable[[], float | None]) -> list[StepPlan]:
    """Steps hold as much of prompts as `limits` says, whatever they take. Returns the plans, which
    come as they are made."""
    plans: list[StepPlan] = []
    plan = scheduler.plan

    def spy() -> StepPlan:
        plans.append(plan())
        return plans[-1]

    scheduler.chunks.limit = lambda *args: limits()  # type: ignore[method-assign]
    scheduler.plan = spy  # type: ignore[method-assign]
    return plans


def num_waves(plans: list[StepPlan]) -> int:
    """Those that took several steps to their end."""
    return sum(p.wave is not None and p.wave.is_last and p.wave.first > 0 for p in plans)


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
def test_a_forward_that_waits_between_layers_is_a_forward(family: str) -> None:
    """Others compute between any two of its layers, and whole forwards of the same model."""
    ops = provider(num_threads=2)
    model = tiny_model(ops, family)
    groups = len(model.kv_specs("f16"))
    ids = [prompt(number, 70) for number in range(3)]
    blocks = [[3, 7, 1], [0, 5, 2], [4, 6, 8]]

    def spans(start: int, stop: int, *rows: int) -> list[Span]:
        return [Span(ids[r], start, stop, blocks[r]) for r in rows]

    plain, waited = (make_cache(model, ops, 9, "f16") for _ in range(2))
    for kv in plain, waited:
        model.forward(make_batch(spans(0, 40, 0, 1, 2), groups), kv)
    expected_LV = [model.forward(make_batch(spans(40, 70, r), groups), plain) for r in (0, 1)]
    forward = model.hidden_by_layer(make_batch(spans(40, 70, 0), groups), waited)
    other = model.hidden_by_layer(make_batch(spans(40, 70, 1), groups), waited)
    found: dict[int, Any] = {}
    position = 40
    while len(found) < 2:
        for number, one in enumerate((forward, other)):
            try:
                if number not in found:
                    next(one)
            except StopIteration as end:
                found[number] = end.value
        step = make_batch(spans(position, position + 1, 2), groups)
        np.testing.assert_array_equal(model.forward(step, waited), model.forward(step, plain))
        position += 1
    assert position - 40 == model.config.num_layers
    for number in range(2):
        np.testing.assert_array_equal(model.logits(found[number]), expected_LV[number])


def beside_streams(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams], seed: int = 0
) -> tuple[list[Answer], list[StepPlan]]:
    """The answers to prompts that come while two others are answered, and the plans of the steps."""
    limits = random.Random(seed)
    plans = force(engine.scheduler, lambda: limits.choice([0, 0.4, 1, 3, 6]))
    for number in 8, 9:
        engine.add(prompt(number, 20 + number), EVERY)
    engine.step()
    builders = {
        engine.add(ids, one): CompletionBuilder(ids)
        for ids, one in zip(prompts, params, strict=True)
    }
    found = {}
    while engine.has_work:
        for delta in engine.step():
            one = builders.get(delta.request_id)
            if one is not None and (answer := one.push(delta)) is not None:
                found[delta.request_id] = (answer.token_ids, answer.logprobs, answer.text)
    engine.scheduler.check()
    return [found[one] for one in builders], plans


class _Fails:
    """Reads the target's states, and fails at the step that it is told to fail at."""

    name, is_instant, reads_hidden = "fails", True, True

    def __init__(self, at: int) -> None:
        self._left = at

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [Guess() for _ in asks]

    def observe(self, seen: Seen) -> None:
        assert seen.hidden is not None and len(seen.hidden) == sum(i.num_tokens for i in seen.items)
        self._left -= 1
        if not self._left:
            raise RuntimeError("amid a wave")

    def forget(self, row: int) -> None: ...


@pytest.mark.parametrize("at", [1, 12, 13, 14, 1000])
def test_who_reads_states_may_fail_amid_a_wave(at: int) -> None:
    """What a wave computes is decided when it begins."""
    engine = tiny_engine("llama", "q4", drafting=Given(lambda runner: _Fails(at)))
    found, plans = beside_streams(engine, PROMPTS, PARAMS, seed=3)
    assert found == expected("llama")
    assert num_waves(plans) > 3


@pytest.mark.parametrize("family", NAMES)
def test_every_family(family: str) -> None:
    """Chunks of several prompts on their way at once, a layer or two a step; the second time with
    prefixes that the first left."""
    engine = tiny_engine(family, "q4", provider(num_threads=2))
    found, plans = beside_streams(engine, PROMPTS, PARAMS)
    assert found == expected(family)
    assert num_waves(plans) > 3
    assert beside_streams(engine, PROMPTS, PARAMS, 1)[0] == expected(family)


# ---- what is written where -------------------------------------------------------------------

LAYERS = 3


class LayeredExecutor:
    """As FakeExecutor, of several layers with caches of their own: a wave goes on with the blocks that
    it began with, whoever has them by then."""

    def __init__(self, windows: tuple[int | None, ...]) -> None:
        self.layers = [FakeExecutor(windows) for _ in range(LAYERS)]
        self.num_waves = 0
        self._wave: list[PlanItem] = []
        self._rows: list[list[Row]] = []
        self._done = 0

    @property
    def lost_plan(self) -> bool:
        return self.layers[0].lost_plan

    @lost_plan.setter
    def lost_plan(self, value: bool) -> None:
        for layer in self.layers:
            layer.lost_plan = value

    def execute(self, plan: StepPlan) -> StepOutput:
        wave, whole = plan.wave, replace(plan, wave=None)
        mine = {item.request_id for item in self._wave}
        if (wave is not None and wave.first == 0) or mine & {i.request_id for i in plan.items}:
            self._take_back()
        outputs = [layer.execute(whole) for layer in self.layers]
        assert outputs == outputs[:1] * LAYERS
        [output] = outputs[:1]
        if wave is None:
            return output
        if wave.first == 0:
            self._begin(wave.items)
        assert wave.items is self._wave and wave.first == self._done < wave.end
        assert wave.is_last == (wave.end == LAYERS)
        bare = [replace(item, new_blocks=[[] for _ in item.new_blocks]) for item in wave.items]
        for number in range(wave.first, wave.end):
            rows = [self.layers[number].rows.get(item.row) for item in wave.items]
            assert all(a is b for a, b in zip(rows, self._rows[number], strict=True)), "gone"
            last = self.layers[number].execute(StepPlan(items=bare))
        self._done = wave.end
        output.layer_s = [0.001] * (wave.end - wave.first)
        if wave.is_last:
            output.sampled += last.sampled
            output.logprobs += last.logprobs
            self.num_waves += wave.first > 0
            self._wave = []
        return output

    def _begin(self, items: list[PlanItem]) -> None:
        self._wave, self._done = items, 0
        self._rows = [[layer.rows[item.row] for item in items] for layer in self.layers]
        for rows in self._rows:
            for row, item in zip(rows, items, strict=True):
                for table, blocks in zip(row.tables, item.new_blocks, strict=True):
                    table += blocks

    def _take_back(self) -> None:
        """The wave is given up: its chunks are begun again, and what it wrote does not count."""
        for rows in self._rows[: self._done] if self._wave else []:
            for row, item in zip(rows, self._wave, strict=True):
                if row.computed == item.start + item.num_tokens:
                    row.computed = item.start
                    if item.sample:
                        row.tokens.pop()
        self._wave = []


class LayeredBench(Bench):
    """Steps hold as much of prompts as a number says that is drawn."""

    def __init__(self, seed: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, num_layers=LAYERS, **options)
        self.limit_to(*[0, 0.4, 1, 2, 5, 5, None], seed=seed)
        self.executor: Any = LayeredExecutor(args[0] if args else (None,))

    def limit_to(self, *limits: float | None, seed: int = 0) -> None:
        rng = random.Random(seed)
        chunks = self.scheduler.chunks
        chunks.limit = lambda *args: rng.choice(limits)  # type: ignore[method-assign]

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(50):
            if done():
                return
            self.step()
        raise AssertionError("it does not come")


class WaveMachine(SchedulerMachine):
    """All that SchedulerMachine does, beside waves."""

    @initialize(
        seed=st.integers(0, 2**16),
        policy=st.sampled_from(POLICIES),
        windows=st.sampled_from(WINDOWS),
        blocks=st.integers(9, 30),
        rows=st.integers(1, 6),
        budget=st.sampled_from([3, 7, 16, 64]),
        prefix_cache=st.booleans(),
    )
    def start(  # type: ignore[override]
        self,
        seed: int,
        policy: Policy,
        windows: tuple[int | None, ...],
        blocks: int,
        rows: int,
        budget: int,
        prefix_cache: bool,
    ) -> None:
        self.bench = LayeredBench(seed, windows, blocks, rows, budget, 32, prefix_cache, policy)


WaveMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWaves = WaveMachine.TestCase


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_thousand_requests_leak_nothing(windows: tuple[int | None, ...]) -> None:
    rng = random.Random(7)
    blocks = 24 if None in windows else 6
    bench = LayeredBench(1, windows, blocks=blocks, rows=6, budget=12, context=32)
    while len(bench.requests) < 1000 or bench.alive:
        if len(bench.requests) < 1000 and len(bench.alive) < 12 and rng.random() < 0.7:
            ids = [*rng.choice(BEGINNINGS)[: rng.randrange(20)], rng.randrange(VOCAB)]
            bench.add(ids, params(rng.randint(1, 20), rng.randint(1, 5)))
        bench.step()
        if bench.alive and rng.random() < 0.05:
            bench.abort(rng.choice(list(bench.alive.values())))
    bench.nothing_leaked()
    assert bench.scheduler.num_preemptions > 0
    assert bench.executor.num_waves > 100


def begin_wave(bench: LayeredBench, prompt: list[int], limit: float = 2.0) -> Request:
    """A request of which a chunk is on its way, beside one that is answered."""
    bench.limit_to(limit)
    bench.add([9, 8], params(60, ignore_eos=True))
    bench.step()
    request = bench.add(prompt, params(5, seed=3))
    bench.until(lambda: request.in_wave)
    return request


def test_a_wave_whose_request_goes_is_given_up_and_others_begin_again() -> None:
    bench = LayeredBench(0, budget=12)
    begin_wave(bench, [1, 2, 3, 4, 5, 6, 7, 8], 0.4)
    other = bench.add([7] * 9, params(5, seed=4))
    bench.limit_to(4.0)
    bench.until(lambda: other.in_wave)
    gone, start = bench.alive["1"], other.num_computed_tokens
    assert gone.in_wave and bench.scheduler.kv_usage > 0
    bench.abort(gone)
    assert not other.in_wave and other.num_computed_tokens == start
    plan = bench.plan()
    assert plan.wave is not None and plan.wave.first == 0
    assert [item.request_id for item in plan.wave.items] == [other.id]
    bench.commit(plan, bench.executor.execute(plan))
    bench.finish_all()
    report = other.ledger.report(bench.scheduler._clock())
    assert report["prefill"]["tokens"] == 9, "counted once"
    assert sum(report["parts_ns"].values()) == report["wall_ns"]


def test_the_state_of_a_wave_that_was_given_up_is_not_found() -> None:
    """It was overwritten in its place, in some layers."""
    bench = LayeredBench(0, (None, STATE))
    first = begin_wave(bench, [1, 2, 3, 4, 5, 6, 1, 2, 3], 0.4)
    bench.until(lambda: first.in_wave and first.num_computed_tokens % SIZE == 2)
    known = first.token_ids[: first.num_computed_tokens]
    bench.abort(first)
    again = bench.add([*known, 9, 9], params(5, seed=3))
    bench.finish_all()
    assert again.num_cached_tokens < len(known)


def test_while_a_wave_goes_on_nobody_starts() -> None:
    """But what is in it ends as soon as nobody is answered any more."""
    bench = LayeredBench(0)
    request = begin_wave(bench, [1, 2, 3, 4, 5, 6], 0.4)
    late = bench.add([5, 4, 3], params())
    plan = bench.plan()
    assert not plan.started and plan.wave is not None and not plan.wave.is_last
    bench.commit(plan, bench.executor.execute(plan))
    bench.abort(bench.alive["0"])
    plan = bench.plan()
    assert plan.wave is not None and plan.wave.is_last and plan.wave.first > 0
    bench.commit(plan, bench.executor.execute(plan))
    assert not request.in_wave and late.status is Status.WAITING
    bench.finish_all()


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_finishes(policy: Policy) -> None:
    """All small cases: too little memory for all, and chunks that take several steps."""
    shapes = list(product(((4, 6), (11, 6)), repeat=3))
    for windows, limit, blocks in product(((None,), (None, 6), (None, STATE)), (0.4, 3.0), (5, 8)):
        for shape in shapes:
            bench = LayeredBench(0, windows, blocks, 3, 8, 33, False, policy)
            bench.limit_to(limit)
            for number, (prompt_length, length) in enumerate(shape):
                ids = [number + 1] * prompt_length
                bench.add(ids, params(length, seed=number, ignore_eos=True))
                bench.step()
            for _ in range(1000):
                if bench.scheduler.has_work():
                    bench.step()
            bench.nothing_leaked()


# ---- everything else that engines do ---------------------------------------------------------


def test_adapters() -> None:
    """A wave has rows of several adapters, and so have the steps beside it."""
    several = [
        replace(one, adapter=name)
        for one, name in zip(PARAMS, cycle(["one", None, "two"]), strict=False)
    ]
    engine = adapted_engine(prefix_cache=False)
    alone = [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, several, strict=True)]
    found, plans = beside_streams(adapted_engine(), PROMPTS, several)
    assert found == alone and num_waves(plans) > 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek"])
def test_those_that_forget(family: str) -> None:
    forget = [replace(one, attention_window=40, attention_sinks=4) for one in PARAMS]
    engine = tiny_engine(family, prefix_cache=False)
    alone = [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, forget, strict=True)]
    found, plans = beside_streams(tiny_engine(family), PROMPTS, forget)
    assert found == alone and num_waves(plans) > 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_whatever_is_asked_of_a_prompt_and_of_its_first_token(family: str) -> None:
    """Log-probs of it, a budget for what its answer sees, grammars, thoughts that must end."""
    thinking = ThinkingBudget(3, (7, 8), (), is_open=True)
    asked = [
        *(replace(one, prompt_logprobs=2) for one in PARAMS[:2]),
        *(replace(one, attention_budget=1, prompt_logprobs=0) for one in PARAMS[2:4]),
        *(replace(one, grammar=GRAMMAR) for one in PARAMS[4:6]),
        *(replace(one, thinking=thinking, prompt_logprobs=1) for one in PARAMS[6:]),
    ]
    longer = [*prompt(5, 150), *prompt(6, 60)]
    prompts = [*PROMPTS[:2], longer, longer[:180], *PROMPTS[4:]]

    def scores(engine: Engine) -> list[object]:
        known: list[object] = []
        finish = engine.scheduler._roster.finish

        def spy(request: Request, *args: Any) -> None:
            known.append((request.token_ids[:30], request.prompt_logprobs))
            finish(request, *args)

        engine.scheduler._roster.finish = spy  # type: ignore[method-assign]
        return known

    plain = tiny_engine(family, prefix_cache=False)
    told = scores(plain)
    alone = [answers(plain, [p], [s])[0] for p, s in zip(prompts, asked, strict=True)]
    engine = tiny_engine(family)
    found_told = scores(engine)
    found, plans = beside_streams(engine, prompts, asked)
    assert found == alone and num_waves(plans) > 3
    assert all(one in found_told for one in told) and any(one[1] for one in told)  # type: ignore[index]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_little_memory_and_tiers_below(family: str) -> None:
    """Blocks are given up, saved, loaded and copied between the layers of a chunk."""
    engine = tiny_engine(family, num_blocks=9, max_context=200, kv_host_memory=2**25)
    assert engine.scheduler.kv._below is not None
    engine.scheduler.kv._below.compute_s = lambda start, end: 1e9
    for seed in range(4):
        assert beside_streams(engine, PROMPTS, PARAMS, seed)[0] == expected(family)
    assert engine.tiers is not None and engine.tiers.stats()[0].hits > 0
    engine.close()


def test_a_layer_that_fails_ends_those_of_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    force(engine.scheduler, lambda: 0.4)
    engine.add(PROMPTS[0], EVERY, "stream")
    engine.step()
    engine.add(PROMPTS[4], PARAMS[4], "long")
    engine.step()
    assert engine.scheduler._roster.wave is not None

    def fail(*args: Any) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner._waves, "go_on", fail)
        ended = {delta.request_id: delta.finish_reason for delta in engine.step()}
    assert ended == {"stream": "error", "long": "error"}
    assert answers(engine, PROMPTS, PARAMS) == expected("llama")


# ---- pace ------------------------------------------------------------------------------------

EQUAL = (1 / 30,) * 30
UNEQUAL = tuple((1.0 + 14 * (i % 6 == 5)) / 100 for i in range(30))
"""Each sixth sees everything, the others a window."""


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL])
def test_streams_keep_their_pace_beside_a_prompt_of_any_depth(
    layers: tuple[float, ...], noise: float
) -> None:
    """At its end one token of the prompt takes longer than three quiet steps."""
    costs = Costs(deep=0.024, deep_row=0.0, noise=noise, layers=layers)
    quiet, steps = intervals(Simulation(interactive=INTERACTIVE, costs=costs), 1500)
    late = sorted(steps[100:])
    assert late[int(0.99 * len(late))] <= 2 * (1 + noise) * quiet
    assert late[len(late) // 2] >= 1.5 * quiet
    assert late[-1] <= 2.5 * (1 + noise) * quiet
    whole = replace(costs, layers=(1.0,))
    _, uncut = intervals(Simulation(interactive=INTERACTIVE, costs=whole), 1500)
    assert sorted(uncut)[int(0.99 * len(uncut))] > 3 * quiet, "not by tokens alone"


def test_all_together_takes_no_longer() -> None:
    spans = []
    for target in (INTERACTIVE, UNLIMITED):
        costs = Costs(deep=0.001, deep_row=0.0, layers=EQUAL)
        sim = Simulation(interactive=target, costs=costs)
        intervals(sim, 8_000)
        sim.finish()
        spans.append(sim.now)
    assert spans[0] <= spans[1] / 0.9


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """It waits for the wave that is underway, and its own is short."""
    costs = Costs(deep=0.01, deep_row=0.0, layers=EQUAL)
    sim = Simulation(Fair(), interactive=INTERACTIVE, costs=costs)
    for _ in range(4):
        sim.add(10, 6000)
    for _ in range(20):
        sim.step()
    long = sim.add(2000, 10, of("greedy"))
    while long.num_computed_tokens < 500:
        sim.step()
    short = sim.add(20, 10, of("modest"))
    sim.until(lambda: short.first_token is not None)
    assert long.first_token is None
    assert ttft(short) < 30 * 0.02
