"""A load on an engine, in real time: each session a client that waits for its answers and its tools.

What a turn goes on from is what the engine really answered, so lengths are the trace's and tokens are
not. All waiting is divided by `squeeze`; pauses of clients only, computing takes the time it takes.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from agentload.configs import Config
from agentload.load import Load, Session
from agentload.simulate import Result, waits_for
from elinvar.base.config import EngineConfig
from elinvar.base.errors import ElinvarError
from elinvar.base.handling import Handling
from elinvar.base.plan import StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.engine.aio import Ask, AsyncEngine
from elinvar.engine.core import Engine
from elinvar.run.ahead import Begun

SPARE_BLOCKS = 2
"""Beyond what the longest conversation needs."""
HOST_OVERHEAD = 4 << 20
"""Bytes of a host tier that hold no block, and more."""


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens that memory holds."""

    pool_tokens: int
    host_tokens: int
    """In a host tier, where the configuration has one."""


def run(
    model: str,
    load: Load,
    config: Config,
    room: Room,
    squeeze: float,
    threads: int | None,
    least: int,
) -> Result:
    """Exits with a sentence where the engine cannot be made so."""
    longest = max(one.conversation.num_tokens for one in load.sessions)
    try:
        size = _block_bytes(model, threads)
        blocks = -(-max(room.pool_tokens, longest) // size.tokens) + SPARE_BLOCKS
        more = dict(config.engine)
        if config.host:
            more["kv_host_memory"] = HOST_OVERHEAD + room.host_tokens // size.tokens * size.bytes
        wanted = EngineConfig(
            num_threads=threads,
            kv_memory=blocks * size.bytes,
            max_context=longest,
            **more,
        )
        engine = Engine.load(model, wanted)
    except ElinvarError as error:
        raise SystemExit(f"{error}") from None
    return drive(engine, load, config, squeeze, least)


def drive(engine: Engine, load: Load, config: Config, squeeze: float, least: int) -> Result:
    """The whole load; closes the engine."""
    result = Result(0, 0, least)
    computed = _count(engine)
    try:
        asyncio.run(_Clients(engine, load, config, squeeze, result).all())
    except* ElinvarError as errors:
        raise SystemExit(f"{errors.exceptions[0]}") from None
    answers = sum(turn.answer - 1 for one in load.sessions for turn in one.turns)
    result.computed = computed[0] - answers
    result.again = result.computed - least
    result.preemptions = engine.scheduler.num_preemptions
    return result


@dataclass(frozen=True, slots=True)
class _Block:
    tokens: int
    bytes: int


def _block_bytes(model: str, threads: int | None) -> _Block:
    engine = Engine.load(model, EngineConfig(num_threads=threads, max_context=64))
    specs = engine.runner.model.kv_specs(engine.config.kv_dtype)
    engine.close()
    if len(specs) > 1:
        raise SystemExit(f"{model} keeps keys of {len(specs)} kinds; a pool's share is of one.")
    return _Block(specs[0].block_size, specs[0].block_bytes)


def _count(engine: Engine) -> list[int]:
    """Tokens that the engine computes from now on, whatever for."""
    begin, total = engine.runner.begin, [0]

    def counted(plan: StepPlan) -> Begun:
        total[0] += plan.num_tokens
        return begin(plan)

    engine.runner.begin = counted  # type: ignore[method-assign]
    return total


class _Clients:
    def __init__(
        self, engine: Engine, load: Load, config: Config, squeeze: float, result: Result
    ) -> None:
        self._engine = AsyncEngine(engine)
        self._load, self._config, self._squeeze, self._result = load, config, squeeze, result

    async def all(self) -> None:
        self._engine.start()
        began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for session in self._load.sessions:
                    if session.conversation.parent is None:
                        group.create_task(self._session(group, session, [], session.at))
        finally:
            await self._engine.shutdown()
        self._result.seconds = time.monotonic() - began

    async def _session(
        self, group: asyncio.TaskGroup, session: Session, known: list[int], wait: float
    ) -> None:
        """known: what it begins with. Its tokens beyond are the trace's."""
        block = self._load.scale.block
        for index, turn in enumerate(session.turns):
            await asyncio.sleep((wait if index == 0 else session.pauses[index]) / self._squeeze)
            stream = self._load.tokens(session, turn.prompt)
            prompt = known[: turn.prompt] + stream[len(known) :]
            known = prompt + await self._turn(session, index, prompt)
            for fork, first in session.after(index):
                if fork is not session:
                    shared = prompt[: turn.prompt // block * block]
                    pause = fork.pauses[first]
                    group.create_task(self._session(group, fork, shared, pause))

    async def _turn(self, session: Session, index: int, prompt: list[int]) -> list[int]:
        handling, hint = Handling(), self._config.hint
        if hint is not None:
            back = hint(session, index)
            back = None if back is None else back / self._squeeze
            kind = waits_for(session, index) if self._config.tools else None
            handling = Handling(session=session.name, expect_return_s=back, pause_kind=kind)
        params = SamplingParams(session.turns[index].answer, temperature=0, ignore_eos=True)
        answer: list[int] = []
        began = time.monotonic()
        ask = Ask(prompt, params, handling=handling)
        async for _, delta in self._engine.generate_all([ask]):
            if delta.error:
                raise SystemExit(f"The engine failed: {delta.error}")
            if not answer and delta.token_ids:
                kind = self._result.returning if index else self._result.first_turns
                kind.append(time.monotonic() - began)
            answer += delta.token_ids
        return answer
