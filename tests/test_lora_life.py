"""The life of LoRA adapters: loaded, asked for, unloaded while others run, loaded again as another."""

from __future__ import annotations

import asyncio
import gc
import weakref
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import adapted_engine, random_adapter
from elinvar.base.errors import EngineError, InputError, ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.adapters import Adapters
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.llm import LLM
from elinvar.engine.output import CompletionBuilder
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.layout import Weight
from engines import Answer, answers, provider, tiny_engine, tiny_parts
from test_invariance import FAMILIES, PARAMS, PROMPTS, Life


def test_unloading_waits_for_those_who_run() -> None:
    engine = adapted_engine(max_adapters=3)
    asked = replace(PARAMS[0], adapter="one")
    wanted = answers(adapted_engine(), [PROMPTS[3]], [asked])[0]
    builder = CompletionBuilder(PROMPTS[3])
    engine.add(PROMPTS[3], asked)
    for delta in engine.step():
        builder.push(delta)
    engine.unload_adapter("one")
    assert engine.adapters.names == ["two"] and engine.metrics.adapters == 1
    with pytest.raises(InputError, match="no adapter 'one'; loaded: two"):
        engine.add(PROMPTS[3], asked)
    # Its name is free, its memory is not: this is another adapter.
    engine.add_adapter("one", random_adapter(tiny_parts(), 9))
    with pytest.raises(InputError, match="max_adapters is 3, and no place is free"):
        engine.add_adapter("four", random_adapter(tiny_parts(), 10))
    while engine.has_work:
        for delta in engine.step():
            done = builder.push(delta)
    assert done is not None
    assert (done.token_ids, done.logprobs, done.text) == wanted
    assert engine.adapters.num_held == 2
    other = answers(engine, [PROMPTS[3]], [asked])[0]
    assert other != wanted
    fresh = adapted_engine()
    assert answers(fresh, [PROMPTS[3]], [asked])[0] == wanted
    fresh.unload_adapter("one")  # whose number the next one has, and steps were recorded with it
    fresh.add_adapter("one", random_adapter(tiny_parts(), 9))
    assert answers(fresh, [PROMPTS[3]], [asked])[0] == other


def test_however_a_request_ends_it_lets_go() -> None:
    engine = adapted_engine()
    asked = replace(PARAMS[0], adapter="two")
    request_id = engine.add(PROMPTS[0], asked)
    engine.step()
    engine.unload_adapter("two")
    assert engine.adapters.num_held == 2
    engine.abort(request_id)
    assert engine.adapters.num_held == 1
    engine.add(PROMPTS[0], replace(asked, adapter="one"), "id")
    with pytest.raises(InputError, match="in use"):
        engine.add(PROMPTS[0], replace(asked, adapter="one"), "id")
    engine.unload_adapter("one")
    engine.runner.graphs.adapted = None  # the step fails
    deltas = engine.step() + engine.step()
    assert deltas[-1].finish_reason == "error"
    assert engine.adapters.num_held == 0


def test_a_closed_engine_lets_go_of_model_and_adapters() -> None:
    parts = tiny_parts()
    copies = {
        name: copy(value) if isinstance(value, Weight) else value
        for name, value in parts.weights.items()
    }
    parts = replace(parts, weights=copies)
    ops: Any = AdaptedOps(provider())
    engine = tiny_engine(ops=ops, model=parts.build(ops))
    engine.adapters = Adapters(parts, ops, 2)
    adapter = random_adapter(parts, 1)
    engine.add_adapter("one", adapter)
    engine.add(PROMPTS[3], replace(PARAMS[0], adapter="one"))
    engine.step()
    weights = [weakref.ref(w) for w in copies.values() if isinstance(w, Weight)]
    weights += [weakref.ref(pair.a) for pair in adapter.pairs.values()]
    engine.close()
    del parts, copies, adapter
    gc.collect()
    assert not any(weight() for weight in weights)
    for late in (lambda: engine.load_adapter("x", "x"), lambda: engine.push_weights({})):
        with pytest.raises(EngineError, match="closed"):
            late()
    engine.close()


def test_names() -> None:
    engine = adapted_engine()
    adapter = random_adapter(tiny_parts(), 5)
    for name, reason in (("", "1 to 200"), ("a\n", "printable"), ("one", "already")):
        with pytest.raises(InputError, match=reason):
            engine.add_adapter(name, adapter)
    with pytest.raises(InputError, match="no adapter 'three'"):
        engine.unload_adapter("three")
    with pytest.raises(InputError, match="none is loaded"):
        answers(tiny_engine(), [[1]], [SamplingParams(adapter="one")])
    with pytest.raises(ModelError, match="without files"):
        tiny_engine().load_adapter("x", "x")
    with pytest.raises(InputError, match="must be a name"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]


def test_llm_takes_an_adapter_for_all_or_one_a_prompt() -> None:
    llm = LLM(adapted_engine())
    greedy = SamplingParams(max_tokens=6, temperature=0, seed=0)
    one, two = ([replace(greedy, adapter=name)] for name in ("one", "two"))
    ids = PROMPTS[2]
    expected_one = llm.generate([ids], one)[0].token_ids
    expected_two = llm.generate([ids], two)[0].token_ids
    assert llm.generate([ids], greedy, adapter="one")[0].token_ids == expected_one
    mixed = llm.generate([ids, ids], [greedy, *two], adapter="one")
    assert [done.token_ids for done in mixed] == [expected_one, expected_two]
    llm.unload_adapter("one")
    with pytest.raises(InputError, match="no adapter"):
        llm.generate([ids], greedy, adapter="one")


def test_asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps, while answers go on; who waits is told when the engine has stopped."""
    core = adapted_engine()
    asked = replace(PARAMS[6], adapter="one")
    wanted = answers(core, [PROMPTS[6]], [asked])[0][0]
    more = random_adapter(tiny_parts(), 5)
    monkeypatch.setattr(core.adapters, "read", lambda path: more)

    async def test() -> None:
        engine = AsyncEngine(core)
        engine.start()
        deltas = engine.generate(PROMPTS[6], asked)
        ids = (await anext(deltas)).token_ids
        await engine.load_adapter("three", "folder")
        with pytest.raises(InputError, match="already"):
            await engine.load_adapter("three", "folder")
        await engine.unload_adapter("one")
        with pytest.raises(InputError, match="no adapter 'one'; loaded: two, three"):
            engine.generate(PROMPTS[6], asked)
        assert ids + [t async for delta in deltas for t in delta.token_ids] == wanted
        assert core.adapters.num_held == 2
        monkeypatch.setattr(core, "unload_adapter", lambda name: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await engine.unload_adapter("two")
        monkeypatch.setattr(core, "step", lambda: 1 / 0)
        with pytest.raises(EngineError, match="stopped"):
            async for _ in engine.generate(PROMPTS[6], PARAMS[0]):
                pass
        with pytest.raises(EngineError, match="stopped"):
            await engine.unload_adapter("two")
        monkeypatch.setattr(core.adapters, "check_new", lambda name: 1 / 0)
        with pytest.raises(EngineError, match="stopped"):
            await engine.load_adapter("four", "folder")

    asyncio.run(test())


# ---- a random life ------------------------------------------------------------------------------

NAMES = ("one", "two")
VERSIONS = 3
"""Contents that a name may stand for in turn."""
_alone: dict[tuple[Any, ...], Answer] = {}


def adapter_of(family: str, name: str, version: int) -> Any:
    return random_adapter(tiny_parts(family), 10 * NAMES.index(name) + version, 3 + version)


def by_itself(family: str, which: int, params: int, name: str | None, version: int) -> Answer:
    key = (family, which, params, name, version if name else 0)
    if key not in _alone:
        engine = tiny_engine(family, ops=AdaptedOps(provider()), prefix_cache=False)  # type: ignore[arg-type]
        if name is not None:
            engine.add_adapter(name, adapter_of(family, name, version))
        asked = replace(PARAMS[params], adapter=name)
        _alone[key] = answers(engine, [PROMPTS[which]], [asked])[0]
    return _alone[key]


class AdaptedLife(Life):
    def __init__(self, family: str, **options: Any) -> None:
        ops: Any = AdaptedOps(provider())
        super().__init__(tiny_engine(family, ops=ops, max_adapters=4, **options))
        self.family = family
        self.versions: dict[str, int] = dict.fromkeys(NAMES, -1)
        self.loaded: dict[str, bool] = dict.fromkeys(NAMES, False)
        self.with_adapter: dict[str, tuple[str | None, int]] = {}

    def ask(self, request: tuple[int, int, str | None]) -> None:
        which, params, name = request
        asked = replace(PARAMS[params], adapter=name)
        if name is not None and not self.loaded[name]:
            with pytest.raises(InputError, match="no adapter"):
                self.engine.add(PROMPTS[which], asked)
            return
        request_id = self.engine.add(PROMPTS[which], asked)
        self.asked[request_id] = which, params
        self.with_adapter[request_id] = name, self.versions[name] if name else 0
        self.builders[request_id] = CompletionBuilder(PROMPTS[which])

    def turn(self, name: str) -> None:
        """Unload it, or load its next content."""
        if self.loaded[name]:
            self.engine.unload_adapter(name)
        elif self.engine.adapters.num_held < 4:
            self.versions[name] = (self.versions[name] + 1) % VERSIONS
            adapter = adapter_of(self.family, name, self.versions[name])
            self.engine.add_adapter(name, adapter)
        else:
            return
        self.loaded[name] = not self.loaded[name]


ASK = st.tuples(
    st.just("ask"), st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([None, *NAMES]))
)
EVENTS = st.one_of(
    ASK,
    ASK,
    st.tuples(st.just("turn"), st.sampled_from(NAMES)),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("preempt"), st.integers(0, 5)),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    events=st.lists(EVENTS, min_size=10, max_size=50),
    num_blocks=st.integers(8, 24),
    rows=st.integers(1, 5),
    chunk=st.sampled_from([1, 16, 33, 100]),
)
def test_loads_and_unloads_amid_requests(
    family: str, events: list[tuple[str, Any]], num_blocks: int, rows: int, chunk: int
) -> None:
    life = AdaptedLife(
        family, num_blocks=num_blocks, max_context=200, max_rows=rows, max_step_tokens=chunk
    )
    for name in NAMES:
        life.turn(name)
    for event, value in events:
        getattr(life, event)(value)
        life.engine.scheduler.check()
    while life.engine.has_work:
        life.step(1)
    for request_id, (which, params) in life.asked.items():
        ids, logprobs, text = by_itself(family, which, params, *life.with_adapter[request_id])
        builder = life.builders[request_id]
        got = len(builder.token_ids)
        if request_id not in life.aborted:
            assert (got, "".join(builder.texts)) == (len(ids), text)
        assert builder.token_ids == ids[:got]
        assert builder.logprobs == logprobs[:got]
    assert life.engine.adapters.num_held == sum(life.loaded.values())
