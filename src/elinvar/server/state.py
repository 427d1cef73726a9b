"""What a server keeps and what runs in it without a client: stored responses, files, batches. Owns their
start and their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.routing import Route

from elinvar.server.batch_runner import RETRY_S, Limits, Runner
from elinvar.server.batch_state import Batches
from elinvar.server.batches import ENDPOINTS, BatchRoutes
from elinvar.server.files import FileRoutes, Files
from elinvar.server.inside import Inside
from elinvar.server.responses import ResponseRoutes
from elinvar.server.responses_background import Background
from elinvar.server.responses_state import Responses
from elinvar.server.served import Models
from elinvar.server.store import Store


@dataclass(frozen=True, slots=True)
class StateOptions:
    folder: Path | None = None
    """None: one that ends with the server."""
    max_body_bytes: int = 16 * 2**20
    """Of a request, and of a batch's line."""
    concurrency: int = 8
    """Lines of batches that run at once."""
    retry_s: float = RETRY_S
    """Between attempts where a disk is full or a queue is."""


class State:
    def __init__(self, options: StateOptions) -> None:
        """Raises ElinvarError for a folder that is there and cannot be used."""
        self.store = Store(options.folder)
        self._options = options
        self._responses: ResponseRoutes | None = None
        self._batches: BatchRoutes | None = None

    def routes(
        self, others: Sequence[Route], has_model: Callable[[str], bool], models: Models | None
    ) -> list[Route]:
        """others: the endpoints that lines of batches may ask for. models: those that answer in
        /v1/responses."""
        options, routes = self._options, []
        if models is not None:
            responses = Responses(self.store)
            background = Background(responses, options.retry_s)
            self._responses = ResponseRoutes(models, responses, background, options.max_body_bytes)
            routes += self._responses.routes()
        files, batches = Files(self.store), Batches(self.store)
        inside = Inside.of([*others, *routes], ENDPOINTS)
        limits = Limits(options.concurrency, options.max_body_bytes, options.retry_s)
        runner = Runner(batches, files, inside, has_model, limits)
        there = frozenset(inside.apps)
        self._batches = BatchRoutes(batches, files, runner, there, options.max_body_bytes)
        return [*routes, *FileRoutes(files).routes(), *self._batches.routes()]

    async def start(self) -> None:
        """Goes on with what the last server of this folder left."""
        if not self.store.has_something:
            return
        if self._responses is not None:
            await self._responses.resume()
        if self._batches is not None:
            await self._batches.files.sweep()
            await self._batches.resume()

    async def shutdown(self) -> None:
        """What runs is left to the next start."""
        if self._batches is not None:
            await self._batches.runner.shutdown()
        if self._responses is not None:
            await self._responses.background.shutdown()
        await self.store.close()
