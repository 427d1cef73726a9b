"""What a server keeps and what runs in it without a client: stored responses, files, batches. Owns their
start and their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.routing import Route
from starlette.types import Scope

from elinvar.server.batch_runner import RETRY_S, Limits, Runner
from elinvar.server.batch_state import Batches
from elinvar.server.batches import ENDPOINTS, BatchRoutes
from elinvar.server.file_store import Files
from elinvar.server.files import FileRoutes
from elinvar.server.inside import Inside
from elinvar.server.models import Models
from elinvar.server.responses import ResponseRoutes
from elinvar.server.responses_background import Background
from elinvar.server.responses_state import Responses
from elinvar.server.store import Store
from elinvar.server.tenants import NOBODY, Tenants


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
        self.tenants: Callable[[], Tenants] = lambda: NOBODY
        """Those of now."""
        self._responses: ResponseRoutes | None = None
        self._batches: BatchRoutes | None = None

    def routes(
        self,
        others: Sequence[Route],
        has_model: Callable[[Scope, str], bool],
        models: Models | None = None,
    ) -> list[Route]:
        """others: the endpoints that lines of batches may ask for. has_model: whether who sends the
        request of a scope may ask for a model. models: those that answer in /v1/responses."""
        options, routes = self._options, []
        if models is not None:
            responses = Responses(self.store)
            background = Background(responses, options.retry_s)
            self._responses = ResponseRoutes(
                models, responses, background, self._scope_of, options.max_body_bytes
            )
            routes += self._responses.routes()
        files, batches = Files(self.store), Batches(self.store)
        inside = Inside.of([*others, *routes], ENDPOINTS, self._scope_of)
        limits = Limits(options.concurrency, options.max_body_bytes, options.retry_s)
        runner = Runner(
            batches,
            files,
            inside,
            lambda tenant, name: has_model(self._scope_of(tenant), name),
            limits,
        )
        there = frozenset(inside.apps)
        self._batches = BatchRoutes(batches, files, runner, there, options.max_body_bytes)
        return [*routes, *FileRoutes(files).routes(), *self._batches.routes()]

    def _scope_of(self, tenant: str, request_id: str = "") -> dict[str, Any]:
        named = {"elinvar.tenant": tenant, "elinvar.request_id": request_id}
        return {"type": "http", **named, "elinvar.models": self.tenants().models.get(tenant)}

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
