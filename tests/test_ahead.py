"""Steps that begin before the tokens of the last one are known: the same answers, to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import adapted_engine
from elinvar.base.grammar import Regex
from elinvar.base.plan import PlanItem, StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.base.thinking import ThinkingBudget
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given
from elinvar.engine.output import Delta
from elinvar.run.ahead import Begun
from elinvar.run.costs import FIRST
from elinvar.run.drafters.api import Ask, Guess
from elinvar.run.runner import Runner
from engines import ENGINES, Answer, answers, tiny_engine
from late import LateOps
from oracles import Oracle, verify_all

PROMPT = list(b"Elinvar: ")
PROMPTS = [PROMPT, list(b"another one, some more tokens long than a block"), [7, 8], PROMPT * 4]


def asked(**options: Any) -> SamplingParams:
    options = {"max_tokens": 12, "seed": 5, "ignore_eos": True, **options}
    options["min_tokens"] = min(options.get("min_tokens", 0), options["max_tokens"])
    return SamplingParams(**options)


def engines(speculation: str = "off", **options: Any) -> tuple[Engine, Engine, LateOps]:
    """One that goes ahead, one that waits and drafts nothing, and the ops of the first."""
    late, waited = LateOps(), LateOps(ahead=False)
    ahead = tiny_engine(ops=late, speculation=speculation, **options)  # type: ignore[arg-type]
    waiting = tiny_engine(ops=waited, speculation="off", **options)  # type: ignore[arg-type]
    return ahead, waiting, late


def run(engine: Engine) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append(delta)
    engine.scheduler.check()
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    assert engine.scheduler.kv_usage == 0
    return found


def ids_of(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_the_host_waits_only_when_the_next_step_has_begun() -> None:
    engine, waiting, late = engines()
    found = answers(engine, [PROMPT], [asked(temperature=0)])
    assert found == answers(waiting, [PROMPT], [asked(temperature=0)])
    expected = [("begin", 1)]
    for number in range(
        2, 12
    ):  # the first token was waited for, the twelfth is known to be the last
        expected += [("begin", number), ("fetch", number - 1)]
    assert late.calls == [*expected, ("fetch", 11)]


def test_a_provider_that_is_waited_for_gets_no_plan_ahead() -> None:
    _, waiting, _ = engines()
    assert len(run_one(waiting, asked())) == 12
    assert waiting._underway is None


def run_one(engine: Engine, params: SamplingParams, prompt: list[int] = PROMPT) -> list[Delta]:
    engine.add(prompt, params)
    [deltas] = run(engine).values()
    return deltas


PLAIN = st.builds(
    asked,
    max_tokens=st.integers(1, 40),
    seed=st.integers(0, 3),
    temperature=st.sampled_from([0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    logprobs=st.sampled_from([None, 0, 2]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), tuple(range(0, 256, 9))]),
    stop=st.sampled_from([(), ("e", "a"), ("th",)]),
    logit_bias=st.sampled_from([(), ((97, 2.0),)]),
    min_tokens=st.sampled_from([0, 4]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    bad_words=st.sampled_from([(), (), (), ((97, 98),)]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    thinking=st.sampled_from([None, None, None, ThinkingBudget(3, (10,), (11, 12), True)]),
    attention_window=st.sampled_from([None, None, None, 32]),
)


@settings(max_examples=60, deadline=None)
@given(
    asks=st.lists(st.tuples(st.integers(0, 3), PLAIN, st.integers(0, 9)), min_size=1, max_size=7),
    rows=st.integers(1, 6),
    blocks=st.integers(6, 24),
    budget=st.sampled_from([4, 16, 512]),
    speculation=st.sampled_from(["off", "auto"]),
    aborts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), max_size=3),
    preempts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), max_size=3),
)
def test_answers_are_those_of_an_engine_that_waits(
    asks: list[tuple[int, SamplingParams, int]],
    rows: int,
    blocks: int,
    budget: int,
    speculation: str,
    aborts: list[tuple[int, int]],
    preempts: list[tuple[int, int]],
) -> None:
    """Mixtures of all that may and may not go ahead, that come and go amid steps, are short of blocks,
    and find each other's prefixes."""
    options: dict[str, Any] = {"max_rows": rows, "num_blocks": blocks, "max_step_tokens": budget}
    engine, waiting, _ = engines(speculation, max_context=96, **options)
    came: dict[str, list[Delta]] = {}
    ids: list[str] = []
    step = 0
    while len(ids) < len(asks) or engine.has_work:
        for at, (prompt, params, when) in enumerate(asks):
            if at == len(ids) and step >= when:
                ids.append(engine.add(PROMPTS[prompt], params, request_id=str(at)))
        for when, who in aborts:
            if when == step:
                engine.abort(str(who))
        for when, who in preempts:
            if when == step:
                engine.scheduler.preempt(str(who))
        for delta in engine.step():
            came.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check()
        step += 1
    engine._settle()
    assert engine.scheduler.kv_usage == 0
    for at, (prompt, params, _) in enumerate(asks):
        deltas = came[str(at)]
        expected = run_one(waiting, params, PROMPTS[prompt])
        reasons = [d.finish_reason for d in (deltas[-1], expected[-1])]
        text, whole = ("".join(d.text for d in some) for some in (deltas, expected))
        logprobs, all_of_them = (
            [x for d in some for x in d.logprobs] for some in (deltas, expected)
        )
        if reasons[0] == "abort":
            assert whole.startswith(text)
            assert ids_of(expected)[: len(ids_of(deltas))] == ids_of(deltas)
        else:
            assert reasons[0] == reasons[1] and text == whole and ids_of(deltas) == ids_of(expected)
        assert all_of_them[: len(logprobs)] == logprobs


def test_what_a_row_that_ended_wrote_in_vain_is_not_found() -> None:
    """It ends at a stop text amid a block; another goes on from there, and a third by another token."""
    engine, waiting, late = engines()
    _, _, text = answers(waiting, [PROMPT], [asked(max_tokens=40)])[0]
    params = asked(max_tokens=40, stop=(text[20:23],))
    [(ids, _, _)] = answers(engine, [PROMPT], [params])
    assert late.num_ahead > 5 and 10 < len(ids) < 40
    for after in ([], [1], [2, 3, 4]):
        prompt = [*PROMPT, *ids, *after]
        assert answers(engine, [prompt], [asked(logprobs=2)]) == answers(
            waiting, [prompt], [asked(logprobs=2)]
        )
    assert engine.metrics.cached_tokens >= 3 * (len(PROMPT) + len(ids) - 1)


def test_what_gives_way_below_the_cache_is_saved_and_found() -> None:
    """Blocks that a step ahead takes are saved before it writes to them, and contents come back."""
    options: dict[str, Any] = {"num_blocks": 7, "max_rows": 1, "kv_host_memory": 2**22}
    engine, waiting, late = engines(**options)
    below = engine.scheduler.kv._below
    assert below is not None
    below.compute_s = lambda start, end: math.inf  # however slow the machine: fetch
    saved = loaded = 0
    begin = engine.runner.begin

    def counted(plan: StepPlan) -> Begun:
        nonlocal saved, loaded
        saved += len(plan.saves) * plan.is_ahead
        loaded += len(plan.loads)
        return begin(plan)

    engine.runner.begin = counted  # type: ignore[method-assign]
    prompts = [list(range(i, i + 40)) for i in (1, 60, 120)]
    params = [asked(max_tokens=70, logprobs=1)] * 3
    expected = answers(waiting, prompts, params)
    assert answers(engine, prompts, params) == answers(engine, prompts, params) == expected
    assert saved > 0 and loaded > 0 and late.num_ahead > 200
    engine.close()
    waiting.close()


@pytest.mark.parametrize(
    "tied",
    [
        {"grammar": Regex("[a-z ]{50}")},
        {"presence_penalty": 0.5},
        {"bad_words": ((97, 98),)},
        {"thinking": ThinkingBudget(3, (10,), (11, 12), True)},
        {"attention_window": 64},
    ],
)
def test_who_must_be_known_to_go_on_is_waited_for(tied: dict[str, Any]) -> None:
    engine, waiting, late = engines()
    params = asked(**tied)
    assert answers(engine, [PROMPT], [params]) == answers(waiting, [PROMPT], [params])
    assert not late.calls
    both = [params, asked(max_tokens=30)]
    assert answers(engine, [PROMPT] * 2, both) == answers(waiting, [PROMPT] * 2, both)
    assert 10 < late.num_ahead < 20, "when the other has ended"


def test_adapters_go_ahead() -> None:
    late = LateOps()
    engine = adapted_engine(inner=late, speculation="off", max_rows=4)  # type: ignore[arg-type]
    waiting = adapted_engine(inner=LateOps(ahead=False), speculation="off", max_rows=4)  # type: ignore[arg-type]
    params = [asked(adapter=name) for name in (None, "one", "two")]
    assert answers(engine, [PROMPT] * 3, params) == answers(waiting, [PROMPT] * 3, params)
    assert late.num_ahead == 10


def test_who_comes_begins_with_the_next_whole_plan() -> None:
    engine, _, late = engines()
    first = engine.add(PROMPT, asked(max_tokens=50))
    for _ in range(5):
        engine.step()
    second = engine.add(PROMPT, asked(max_tokens=5))
    engine.step()  # that was under way
    assert second in {delta.request_id for delta in engine.step()}
    ahead = late.num_ahead
    assert {first, second} == set(run(engine)) and late.num_ahead > ahead + 3


def test_while_somebody_waits_for_a_row_whole_plans_come_now_and_then() -> None:
    engine, waiting, late = engines(max_rows=1)
    params = [asked(max_tokens=30), asked()]
    assert answers(engine, [PROMPT] * 2, params) == answers(waiting, [PROMPT] * 2, params)
    assert 30 < late.num_ahead < 38


@pytest.mark.parametrize("family", sorted(ENGINES))
def test_every_family(family: str) -> None:
    """Windows give blocks back while the next step is under way; states are waited for."""
    late, waited = LateOps(), LateOps(ahead=False)
    options: dict[str, Any] = {"speculation": "off", "max_step_tokens": 64}
    ahead, waiting = (tiny_engine(family, ops=ops, **options) for ops in (late, waited))  # type: ignore[arg-type]
    params = [asked(max_tokens=50), asked(max_tokens=70, temperature=0)]
    assert answers(ahead, PROMPTS[:2], params) == answers(waiting, PROMPTS[:2], params)
    assert (late.num_ahead > 60) == (ENGINES[family].delta is None)


# ---- failures --------------------------------------------------------------------------------


def broken(found: Any) -> Any:
    def fail() -> None:
        raise RuntimeError("the device died")

    found.result = fail
    return found


@pytest.mark.parametrize("amid", ["begin", "fetch"])
def test_a_step_ahead_that_fails_takes_its_requests_along_and_nobody_else(amid: str) -> None:
    late = LateOps()
    inner = late._sample_ahead
    count = 0

    def sample(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3 and amid == "begin":
            raise RuntimeError("a kernel died")
        return broken(inner(*args)) if count == 3 else inner(*args)

    late.sample_ahead = sample
    engine = tiny_engine(ops=late, speculation="off")  # type: ignore[arg-type]
    ends, fails = engine.add(PROMPT, asked(max_tokens=3)), engine.add(PROMPT, asked())
    deltas = [engine.step() for _ in range(3)]
    late_one = engine.add(PROMPT, asked(max_tokens=2))
    found = run(engine)
    [three] = [d.finish_reason for d in deltas[2] if d.request_id == ends]
    assert three == "length"
    assert [d.error for d in found[fails]] == [
        "RuntimeError: a kernel died" if amid == "begin" else "RuntimeError: the device died"
    ]
    assert len(ids_of(found[late_one])) == 2


def test_a_step_that_fails_leaves_the_one_ahead_to_nobody() -> None:
    late = LateOps()
    inner = late._sample_ahead
    count = 0

    def sample(*args: Any) -> Any:
        nonlocal count
        count += 1
        return broken(inner(*args)) if count in (2, 3) else inner(*args)

    late.sample_ahead = sample
    engine = tiny_engine(ops=late, speculation="off")  # type: ignore[arg-type]
    fails = engine.add(PROMPT, asked(), request_id="a")
    deltas = [delta for _ in range(3) for delta in engine.step()]
    assert [d.request_id for d in deltas if d.error] == [fails]
    engine.add(PROMPT, asked(max_tokens=4), request_id="a")  # the id is free again
    assert len(ids_of(run(engine)["a"])) == 4


def test_what_is_under_way_when_all_have_ended_is_let_go() -> None:
    engine, _, late = engines()
    deltas = run_one(engine, asked(max_tokens=60, stop_token_ids=tuple(range(0, 256, 3))))
    assert deltas[-1].finish_reason == "stop"
    assert not engine.has_work and engine._underway is not None
    engine.close()
    assert engine._underway is None and late.calls[-1][0] == "fetch"


# ---- beside drafts ---------------------------------------------------------------------------


def drafting(period: int, is_instant: bool = True) -> tuple[Engine, Answer, LateOps, Oracle]:
    """Its drafter has a guess for the next token where its index is in the second half of a period."""
    late = LateOps()
    _, waiting, _ = engines()
    [expected] = answers(waiting, [PROMPT], [asked(max_tokens=60)])
    made: list[Oracle] = []

    class Now(Oracle):
        def propose(self, asks: Sequence[Ask]) -> list[Guess]:
            found = super().propose(asks)
            speaks = [ask.num_tokens % period >= period // 2 for ask in asks]
            return [g if s else Guess() for g, s in zip(found, speaks, strict=True)]

    def make(runner: Runner) -> Oracle:
        made.append(Now(runner.rows, [PROMPT + expected[0]], is_instant=is_instant))
        return made[0]

    engine = tiny_engine(ops=late, drafting=Given(make), max_drafts=3)  # type: ignore[arg-type]
    return engine, expected, late, made[0]


def test_where_drafts_promise_more_a_step_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_all(monkeypatch)
    engine, expected, late, _ = drafting(20)
    assert answers(engine, [PROMPT], [asked(max_tokens=60)]) == [expected]
    [stats] = engine.runner.speculator.stats
    assert stats.num_accepted > 15, "of 30 that it spoke of"
    assert late.num_ahead > 15, "of 30 that it did not"


def test_a_drafter_that_takes_its_time_is_asked_at_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verify_all(monkeypatch)
    engine, expected, late, _ = drafting(2, is_instant=False)
    assert answers(engine, [PROMPT], [asked(max_tokens=60)]) == [expected]
    assert late.num_ahead < 5, "before it is known what a step takes"


def test_who_hopes_in_vain_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It guesses well behind a token that is to come, and is silent when that is there."""
    engine, _, _, oracle = drafting(2)
    speculator = engine.runner.speculator
    [source] = speculator._sources
    item = PlanItem("", 0, 7, 1, True, [], 3)
    engine.runner.rows.token_ids[0, :64] = (PROMPT + [1] * 64)[:64]
    oracle._sequences = [(PROMPT + [1] * 64)[:64]]
    assert not speculator.hopes([replace(item, start=8)]), (
        "nothing is drafted before steps are known"
    )
    for _ in range(FIRST):
        speculator.pass_by([item], 0.001)
    balance = source.account._balance
    assert balance is not None
    assert not speculator.hopes([replace(item, start=7)]) and speculator.hopes(
        [replace(item, start=8)]
    )
    speculator.draft([replace(item, start=9)])
    speculator.book([item], StepOutput([[1]], [[]]), 0.0015)
    after = source.account._balance
    assert after is not None and after < balance - 0.0004
