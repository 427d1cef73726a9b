"""AsyncEngine: many consumers, who leaves frees, what fails is told to everybody who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from elinvar.base.errors import EngineError, InputError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.aio import Ask, AsyncEngine
from elinvar.engine.output import Delta
from engines import answers, tiny_engine

PROMPT = list(b"Elinvar: ")


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "seed": 5, "ignore_eos": True, **options})


def run(test: Callable[[AsyncEngine], Awaitable[None]], **options: Any) -> AsyncEngine:
    """Run `test` on a started engine; afterwards nothing may be left in it."""
    engine = AsyncEngine(tiny_engine(**options))

    async def main() -> None:
        engine.start()
        try:
            await asyncio.wait_for(test(engine), 30)
        finally:
            await asyncio.wait_for(engine.shutdown(timeout=5), 30)

    asyncio.run(main())
    engine.engine.scheduler.check()
    assert engine.engine.scheduler.kv_usage == 0
    assert not engine._streams
    return engine


async def read(engine: AsyncEngine, ids: list[int], one: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.generate(ids, one)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


class SlowSteps:
    """Makes a model's forward wait for a permission, so that a test decides when steps happen."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.permits = threading.Semaphore(0)
        self.entered = 0
        model = engine.engine.runner.model
        forward = model.forward

        def wait(batch: Any, kv: Any) -> Any:
            self.entered += 1
            assert self.permits.acquire(timeout=10)
            return forward(batch, kv)

        monkeypatch.setattr(model, "forward", wait)


def gated(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Steps wait for a permission each, so that none is missed by a loop that is late."""
    step, permits = engine.engine.step, threading.Semaphore(0)
    monkeypatch.setattr(engine.engine, "step", lambda: permits.acquire(timeout=10) and step())
    return permits


def test_many_consumers_get_what_each_gets_alone() -> None:
    prompts = [PROMPT * (1 + i % 7) for i in range(40)]
    wanted = [answers(tiny_engine(), [p], [params(seed=i)])[0] for i, p in enumerate(prompts)]

    async def test(engine: AsyncEngine) -> None:
        got = await asyncio.gather(
            *(read(engine, p, params(seed=i)) for i, p in enumerate(prompts))
        )
        for deltas, (ids, _, text) in zip(got, wanted, strict=True):
            assert [t for d in deltas for t in d.token_ids] == ids
            assert "".join(d.text for d in deltas) == text
            assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]

    run(test)


def test_a_closed_iterator_frees_its_blocks_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        steps = SlowSteps(engine, monkeypatch)
        scheduler = engine.engine.scheduler
        async with aclosing(engine.generate(PROMPT, params())) as deltas:
            steps.permits.release()
            await anext(deltas)
            await until(lambda: steps.entered == 2)
        # The second step is in progress: after it, and without another one, all is free.
        assert scheduler.num_running == 1
        steps.permits.release()
        await until(lambda: scheduler.num_running == 0)
        assert scheduler.kv_usage == 0
        assert steps.entered == 2

    run(test)


def test_a_cancelled_task_frees_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        scheduler = engine.engine.scheduler
        permits = gated(engine, monkeypatch)
        reader = asyncio.create_task(read(engine, PROMPT, params(max_tokens=480)))
        other = asyncio.create_task(read(engine, PROMPT, params(max_tokens=100)))
        while scheduler.num_running < 2:
            permits.release()
            await asyncio.sleep(0.001)
        reader.cancel()
        permits.release(500)
        await until(lambda: scheduler.num_running < 2)
        assert sum(len(d.token_ids) for d in await other) == 100
        assert reader.cancelled()

    engine = run(test)
    assert engine.engine.metrics.finished["abort"] == 1


def test_cancelled_before_it_was_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        steps = SlowSteps(engine, monkeypatch)
        first = asyncio.create_task(read(engine, PROMPT, params(max_tokens=2)))
        await until(lambda: steps.entered == 1)
        second = asyncio.create_task(read(engine, PROMPT, params()))
        await asyncio.sleep(0)
        second.cancel()
        steps.permits.release(100)
        assert len(await first) == 2
        await until(lambda: not engine._gone and not engine.engine.has_work)

    run(test)


def test_refusals_come_at_once() -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(InputError) as error:
            engine.generate([], params())
        assert error.value.field == "prompt"
        deltas = engine.generate(PROMPT, params(max_tokens=400), "same")
        await anext(deltas)
        with pytest.raises(InputError) as error:
            await anext(engine.generate(PROMPT, params(), "same"))
        assert error.value.field == "request_id"
        # The one that was refused did not take the other along.
        assert len([d async for d in deltas]) == 399

    run(test)


def test_a_failed_step_is_a_last_delta_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(engine: AsyncEngine) -> None:
        model = engine.engine.runner.model
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", lambda batch, kv: 1 / 0)
            deltas = await read(engine, PROMPT, params())
        assert [d.finish_reason for d in deltas] == ["error"]
        assert deltas[0].error == "ZeroDivisionError: division by zero"
        assert len(await read(engine, PROMPT, params())) == 20
        engine.check_alive()

    run(test)


def test_a_panic_of_a_library_reaches_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rust's come as exceptions that are none of Exception's."""

    class PanicError(BaseException):
        pass

    def panic(plan: object) -> None:
        raise PanicError("index out of bounds")

    async def test(engine: AsyncEngine) -> None:
        monkeypatch.setattr(engine.engine.runner, "begin", panic)
        with pytest.raises(EngineError, match="The engine stopped: index out of bounds"):
            await read(engine, PROMPT, params())
        with pytest.raises(EngineError, match="index out of bounds"):
            engine.check_alive()

    run(test)


def test_a_fatal_error_reaches_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        steps = SlowSteps(engine, monkeypatch)
        running = asyncio.create_task(read(engine, PROMPT, params()))
        await until(lambda: steps.entered == 1)
        just_come = asyncio.create_task(read(engine, PROMPT, params()))
        await until(lambda: bool(engine._arrived))
        monkeypatch.setattr(engine.engine.scheduler, "commit", lambda *a: 1 / 0)
        steps.permits.release(10)
        for task in (running, just_come):
            with pytest.raises(EngineError, match="division by zero") as error:
                await task
            assert isinstance(error.value.__cause__, ZeroDivisionError)
        with pytest.raises(EngineError, match="The engine stopped: division by zero"):
            engine.generate(PROMPT, params())

    run(test)


def test_shutdown_lets_running_requests_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = AsyncEngine(tiny_engine())
        permits = gated(engine, monkeypatch)
        with pytest.raises(EngineError, match="not running"):
            engine.generate(PROMPT, params())
        engine.start()
        reader = asyncio.create_task(read(engine, PROMPT, params(max_tokens=300)))
        late = engine.generate(PROMPT, params())
        permits.release()
        await until(lambda: engine.engine.scheduler.num_running == 1)
        permits.release(400)
        await engine.shutdown()
        assert sum(len(d.token_ids) for d in await reader) == 300
        with pytest.raises(EngineError, match="shutting down"):
            engine.generate(PROMPT, params())
        with pytest.raises(EngineError, match="shutting down"):
            await anext(late)

    asyncio.run(main())


def test_shutdown_aborts_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = AsyncEngine(tiny_engine())
        graphs = engine.engine.runner.graphs
        forward = graphs.forward

        def slow(batch: Any) -> Any:
            time.sleep(0.02)
            return forward(batch)

        monkeypatch.setattr(graphs, "forward", slow)
        engine.start()
        reader = asyncio.create_task(read(engine, PROMPT, params(max_tokens=480)))
        await until(lambda: engine.engine.scheduler.num_running == 1)
        await engine.shutdown(timeout=0.05)
        deltas = await reader
        assert deltas[-1].finish_reason == "abort"
        assert 0 < len(deltas) < 100

    asyncio.run(main())


def test_idle_engine_sleeps() -> None:
    async def test(engine: AsyncEngine) -> None:
        await read(engine, PROMPT, params())
        plans = 0
        plan = engine.engine.scheduler.plan

        def counted() -> Any:
            nonlocal plans
            plans += 1
            return plan()

        engine.engine.scheduler.plan = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.05)
        assert plans == 0

    run(test)


def test_asked_together_they_come_in_the_order_of_the_steps_however_late_the_reader() -> None:
    async def test(engine: AsyncEngine) -> None:
        together = [Ask([n, *PROMPT], params(max_tokens=12)) for n in (1, 2, 3)]
        async with aclosing(engine.generate_all(together)) as deltas:
            order = [(await anext(deltas))[0]]
            while engine.engine.has_work:
                time.sleep(0.001)  # this loop sees nothing until all is there
            order += [index async for index, _ in deltas]
        assert order == [0, 1, 2] * 12

    run(test)


def test_a_loop_that_closed_without_a_word_is_dropped() -> None:
    engine = AsyncEngine(tiny_engine())
    engine.start()
    loop = asyncio.new_event_loop()
    deltas = engine.generate(PROMPT, params(max_tokens=490))

    async def first() -> Any:
        return await anext(deltas)

    loop.run_until_complete(first())
    loop.close()
    deadline = time.monotonic() + 10
    while engine.engine.has_work and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.engine.metrics.finished["abort"] == 1
    asyncio.run(engine.shutdown())


def test_who_wants_the_whole_is_woken_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same deltas as others, of which none came before."""
    wanted, _, _ = answers(tiny_engine(), [PROMPT], [params()])[0]

    async def test(engine: AsyncEngine) -> None:
        permits, woken = gated(engine, monkeypatch), []
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *a: (woken.append(a), call_soon(*a))
        )
        whole = engine.generate_all([Ask(PROMPT, params(), whole=True)])
        found = asyncio.ensure_future(_all(whole))
        for _ in range(19):
            permits.release()
        await until(lambda: engine.engine.metrics.generated_tokens == 19)
        assert not woken and not found.done()
        permits.release(2)
        deltas = await found
        assert len(woken) == 1 and len(deltas) == 20
        assert [t for d in deltas for t in d.token_ids] == wanted

    run(test)


def test_who_wants_the_whole_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        permits = gated(engine, monkeypatch)
        whole = engine.generate_all([Ask(PROMPT, params(), whole=True)])
        reader = asyncio.ensure_future(_all(whole))
        permits.release(3)
        await until(lambda: engine.engine.metrics.generated_tokens == 3)
        reader.cancel()
        await asyncio.wait([reader])
        permits.release(100)
        await until(lambda: not engine.engine.has_work)

    run(test)


async def _all(deltas: AsyncGenerator[tuple[int, Delta], None]) -> list[Delta]:
    return [delta async for _, delta in deltas]
