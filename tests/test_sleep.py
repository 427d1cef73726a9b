"""Sleep: memory is given back, and answers afterwards are those from before, to the bit."""

from __future__ import annotations

import asyncio
import mmap
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import adapted_engine
from all_drafters import ALL
from elinvar.base.config import EngineConfig
from elinvar.base.errors import EngineError
from elinvar.base.handling import Handling
from elinvar.base.sampling import SamplingParams
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given
from elinvar.engine.llm import LLM
from elinvar.engine.output import Delta
from elinvar.ops import Weight
from elinvar.ops.layout import unpack
from elinvar.ops.pages import give_back
from engines import Answer, answers, tiny_engine, tiny_weights
from test_aio import gated, params, read, run, until

PROMPTS = [[5, 9, 1] * 30, [7] * 40]
PARAMS = [SamplingParams(max_tokens=8, temperature=t, seed=3, logprobs=2) for t in (0.0, 1.0)]
ASLEEP = "The model is asleep: wake it up"


def ask(engine: Engine) -> list[Answer]:
    return answers(engine, PROMPTS, PARAMS)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "gpt_oss"])
def test_answers_are_those_from_before(family: str) -> None:
    engine = tiny_engine(family)
    before, cached = ask(engine), engine.metrics.cached_tokens
    blocks = [weakref.ref(one.array) for one in engine.runner._blocks]
    engine.sleep()
    engine.sleep()
    assert engine.is_asleep and engine.metrics.asleep == 1
    assert not any(block() is not None for block in blocks), "the cache is still held"
    assert engine.scheduler.kv.blocks["cached"] == 0 and not engine.has_work
    with pytest.raises(EngineError, match=ASLEEP):
        engine.add(PROMPTS[0], PARAMS[0])
    engine.wake()
    engine.wake()
    assert ask(engine) == before and engine.metrics.cached_tokens == cached
    assert ask(engine) == before and engine.metrics.cached_tokens > cached
    engine.scheduler.kv.check([])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_what_host_memory_keeps_is_found(family: str) -> None:
    engine = tiny_engine(family, kv_host_memory=2**24)
    try:
        before = answers(engine, [PROMPTS[0]], [PARAMS[0]])
        engine.sleep()
        assert engine.scheduler.kv.blocks["cached"] == 0
        engine.wake()
        cached = engine.metrics.cached_tokens
        assert answers(engine, [PROMPTS[0]], [PARAMS[0]]) == before
        assert engine.metrics.cached_tokens - cached >= 64
    finally:
        engine.close()


@pytest.mark.parametrize("drafter", ["model", "aside", "mtp", "eagle3", "medusa", "early exit"])
def test_drafters_begin_anew(drafter: str, tmp_path: Path) -> None:
    model, makers = ALL[drafter](tmp_path)
    before = ask(tiny_engine(model=model, speculation="off"))
    known = [p + a[0] for p, a in zip(PROMPTS, before, strict=True)]
    engine = tiny_engine(model=model, drafting=Given(*makers(known)))
    assert ask(engine) == before
    engine.sleep()
    assert not engine.runner.speculator.stats
    engine.wake()
    assert engine.metrics.drafters == engine.runner.speculator.stats != []
    assert ask(engine) == before
    engine.close()


def test_sessions_go_on() -> None:
    engine = tiny_engine(kv_host_memory=2**24)
    turn = SamplingParams(max_tokens=4, temperature=0)

    def say(ids: list[int]) -> list[int]:
        engine.add(ids, turn, handling=Handling(session="s"))
        return [t for delta in _deltas(engine) for t in delta.token_ids]

    said = say(PROMPTS[0])
    engine.sleep()
    info = engine.sessions.info("s")
    assert info.tokens_in_memory == 0 and (info.tokens_below or 0) >= 64 and not info.leased_tokens
    engine.sessions.check()
    engine.wake()
    assert say([*PROMPTS[0], *said, 1]) and engine.sessions.info("s").turns == 2
    assert engine.sessions.returns["miss"] == 0
    engine.sessions.check()
    engine.close()


def _deltas(engine: Engine) -> list[Delta]:
    found = []
    while engine.has_work:
        found += engine.step()
    return found


def test_not_while_requests_run_and_what_was_ended_is_told() -> None:
    engine = tiny_engine()
    ids = [engine.add(PROMPTS[0], PARAMS[0]) for _ in range(2)]
    engine.step()
    with pytest.raises(EngineError, match="2 requests have not ended; let it sleep when"):
        engine.sleep()
    for one in ids:
        engine.abort(one, "tired")
    engine.sleep()
    assert engine.has_work and {(d.request_id, d.error) for d in engine.step()} == {
        (one, "tired") for one in ids
    }
    assert not engine.has_work
    engine.close()


def test_adapters_and_pushed_weights_while_asleep() -> None:
    engine = adapted_engine("llama", "f32")
    one = SamplingParams(max_tokens=4, temperature=0, adapter="one")
    before = answers(engine, [PROMPTS[1]], [one])
    engine.sleep()
    engine.unload_adapter("two")
    engine.wake()
    assert answers(engine, [PROMPTS[1]], [one]) == before
    engine.unload_adapter("one")
    arrays = {
        n: -unpack(w) if isinstance(w, Weight) else w
        for n, w in tiny_weights("llama", "f32").items()
    }
    engine.sleep()
    assert engine.push_weights(arrays) == 1
    engine.wake()
    pushed = tiny_engine("llama", "f32")
    pushed.push_weights(arrays)
    assert ask(engine) == ask(pushed)


def test_where_there_is_no_memory_it_sleeps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    before = ask(engine)
    engine.sleep()
    with (
        monkeypatch.context() as patch,
        pytest.raises(EngineError, match="no memory to wake up now"),
    ):
        patch.setattr(mmap, "mmap", _no_memory)
        engine.wake()
    assert engine.is_asleep
    engine.wake()
    assert ask(engine) == before


def _no_memory(*args: Any, **options: Any) -> None:
    raise OSError(12, "Cannot allocate memory")


def test_pages_of_a_file_leave_and_come_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 4096)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(pages, np.uint8)[256:]
    anonymous = np.frombuffer(mmap.mmap(-1, 1 << 16), np.uint8)
    anonymous[:] = 7

    def resident() -> int:
        smaps = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(smaps.partition("Rss:")[2].split()[0])

    total = int(array.sum())
    assert resident() > 900
    give_back([array, Weight("f32", (1, 1), anonymous), np.ones(3)])
    assert resident() == 0
    assert int(array.sum()) == total and anonymous.min() == 7


def test_llm_sleeps(tiny_gguf: Path) -> None:
    config = EngineConfig(kv_memory=2**24, num_threads=1)
    with LLM(Engine.load(tiny_gguf, config)) as llm:
        before = llm.generate("Once", PARAMS[0])
        llm.sleep()
        with pytest.raises(EngineError, match=ASLEEP):
            llm.generate("Once", PARAMS[0])
        llm.wake()
        assert llm.generate("Once", PARAMS[0]) == before
        llm.sleep()


def test_it_sleeps_when_those_that_run_have_ended() -> None:
    async def test(engine: AsyncEngine) -> None:
        reading = asyncio.create_task(read(engine, PROMPTS[0], params(max_tokens=50)))
        await until(lambda: bool(engine.engine.running()))
        going = asyncio.create_task(engine.sleep())
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="about to sleep"):
            await read(engine, PROMPTS[1], params())
        deltas = await reading
        await going
        assert deltas[-1].finish_reason == "length" and engine.engine.is_asleep
        with pytest.raises(EngineError, match=ASLEEP):
            engine.generate(PROMPTS[1], params())
        await engine.wake()
        assert await read(engine, PROMPTS[1], params())

    run(test)


def test_it_ends_those_that_run_and_forgets_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        permits = gated(engine, monkeypatch)

        async def going(task: asyncio.Task[Any]) -> Any:
            while not task.done():
                permits.release()
                await asyncio.sleep(0.001)
            return task.result()

        reading = asyncio.create_task(read(engine, PROMPTS[0], params(max_tokens=400)))
        left = asyncio.create_task(engine.sleep())
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        other = asyncio.create_task(read(engine, PROMPTS[1], params(max_tokens=1)))
        assert (await going(other))[-1].finish_reason == "length"
        await going(asyncio.create_task(engine.sleep(abort=True)))
        assert (await reading)[-1].finish_reason == "abort"
        permits.release(100)
        await engine.wake()
        assert await read(engine, PROMPTS[1], params())

    run(test)
