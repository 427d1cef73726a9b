"""A step that hangs, told apart from one that takes long: the log says once where it is, and /health
says that the engine does not go on, so that whoever watches may start another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol

log = logging.getLogger(__name__)

HUNG_S = 300.0
"""Longer than any step should take: its tokens are bounded."""
_LOOK_S = 1.0


class Steps(Protocol):
    @property
    def step_s(self) -> float: ...

    def stack(self) -> str: ...


class Watchdog:
    """Looks at engines once a second. limit_s: a step that takes longer hangs."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._hung: set[int] = set()

    def hangs(self, engine: Steps) -> bool:
        return engine.step_s > self._limit_s

    @asynccontextmanager
    async def watching(self, engines: Callable[[], Sequence[Steps]]) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run(engines))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self, engines: Callable[[], Sequence[Steps]]) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for engine in engines():
                self._look(engine)

    def _look(self, engine: Steps) -> None:
        hangs, known = self.hangs(engine), id(engine) in self._hung
        if hangs and not known:
            self._hung.add(id(engine))
            message = "A step has taken %.0f s and may hang; its thread is here:\n%s"
            log.error(message, engine.step_s, engine.stack())
        elif known and not hangs:
            self._hung.remove(id(engine))
            log.warning("The step that seemed to hang has ended; the engine goes on.")
