"""Models that give their memory back for a while: /sleep, /wake_up and /is_sleeping, as vLLM names them.

They are for whoever runs the server (see tenants.ADMIN), a trainer on the same machine for example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.server.errors import invalid_value
from elinvar.server.reply import reply

if TYPE_CHECKING:
    from elinvar.server.models import Models

LEVELS = "1", "2"
MODES = "wait", "abort"


class SleepRoutes:
    """Of all models that are loaded, or of the one that `model` in the query names."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def routes(self) -> list[Route]:
        return [
            Route("/sleep", self.sleep, methods=["POST"]),
            Route("/wake_up", self.wake_up, methods=["POST"]),
            Route("/is_sleeping", self.is_sleeping, methods=["GET"]),
        ]

    async def sleep(self, request: Request) -> Response:
        """Answers when they sleep. Both levels are one: weights that a file has are mapped, and take no
        memory of the host; pushed ones nobody else has."""
        _choice(request, "level", LEVELS)
        mode = _choice(request, "mode", MODES)
        await self._models.sleep(request.scope, _model(request), mode == "abort")
        return self._answer(request)

    async def wake_up(self, request: Request) -> Response:
        await self._models.wake(request.scope, _model(request))
        return self._answer(request)

    async def is_sleeping(self, request: Request) -> Response:
        return self._answer(request)

    def _answer(self, request: Request) -> Response:
        found = self._models.asleep(request.scope, _model(request))
        return reply({"is_sleeping": bool(found) and all(found.values()), "models": found})


def _model(request: Request) -> str | None:
    return request.query_params.get("model")


def _choice(request: Request, name: str, allowed: tuple[str, ...]) -> str:
    """The first, where none is chosen."""
    given = request.query_params.get(name, allowed[0])
    if given not in allowed:
        raise invalid_value(name, f"{name} must be {' or '.join(allowed)}, got {given[:100]!r}.")
    return given
