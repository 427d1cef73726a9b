"""What a server keeps and what runs in it without a client: stored responses, files, batches. Owns their
start and their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.routing import Route

from elinvar.server.responses import ResponseRoutes
from elinvar.server.responses_background import Background
from elinvar.server.responses_state import Responses
from elinvar.server.served import Models
from elinvar.server.store import Store


class State:
    def __init__(self, folder: Path | None, max_body_bytes: int) -> None:
        """folder None: one that ends with the server. Raises ElinvarError for one that is there and
        cannot be used."""
        self.store = Store(folder)
        self._max_body_bytes = max_body_bytes
        self._responses: ResponseRoutes | None = None

    def routes(self, others: Sequence[Route], models: Models | None = None) -> list[Route]:
        """others: the endpoints that lines of batches may ask for. models: those that answer."""
        routes: list[Route] = []
        if models is not None:
            responses = Responses(self.store)
            background = Background(responses)
            self._responses = ResponseRoutes(models, responses, background, self._max_body_bytes)
            routes += self._responses.routes()
        return routes

    async def start(self) -> None:
        """Goes on with what the last server of this folder left."""
        if self._responses is not None:
            await self._responses.resume()

    async def shutdown(self) -> None:
        """What runs is left to the next start."""
        if self._responses is not None:
            await self._responses.background.shutdown()
        await self.store.close()
