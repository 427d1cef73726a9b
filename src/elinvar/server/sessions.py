"""Sessions over HTTP: /v1/sessions. A request that names one needs none of these; they tell the engine
what a client knows, and what the engine has.

Each tenant sees its own.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.base.errors import InputError
from elinvar.kv.session import Hints, NoSessionError, SessionInfo
from elinvar.server.body import read_body
from elinvar.server.errors import ApiError, invalid_value
from elinvar.server.reply import reply
from elinvar.server.schema import ForkRequest, SessionRequest, decode
from elinvar.server.tenants import tenant_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from elinvar.kv.sessions import Sessions
    from elinvar.server.models import Models

Got = TypeVar("Got")

MAX_FORKS = 128
DEFAULT_LIMIT, MAX_LIMIT = 20, 100


@dataclass(frozen=True, slots=True)
class SessionRoutes:
    """Each model has its own; a name that several have means that of the one listed first."""

    models: Models
    max_body_bytes: int

    def routes(self) -> list[Route]:
        one = "/v1/sessions/{id:path}"
        return [
            Route("/v1/sessions", self.create_session, methods=["POST"]),
            Route("/v1/sessions", self.list_sessions, methods=["GET"]),
            Route(f"{one}/fork", self.fork_session, methods=["POST"]),
            Route(one, self.get_session, methods=["GET"]),
            Route(one, self.update_session, methods=["POST"]),
            Route(one, self.delete_session, methods=["DELETE"]),
        ]

    async def create_session(self, request: Request) -> Response:
        asked = decode(await self._body(request), SessionRequest)
        name, tenant, hints = _name(asked.id), tenant_of(request.scope), _hints(asked)
        target = await self.models.use(request.scope, asked.model or self.models.default)
        create = _told(target.served.engine.with_sessions(lambda s: s.create(name, tenant, hints)))
        return reply(_shown(await create))

    async def list_sessions(self, request: Request) -> Response:
        """The one used last first; `after`: an id of the list before."""
        limit, after = _limit(request), request.query_params.get("after")
        if (order := request.query_params.get("order", "desc")) != "desc":
            raise invalid_value("order", f"order must be desc, got {order[:100]!r}.")
        tenant = tenant_of(request.scope)
        found = [
            one
            for served in self.models.loaded
            for one in await _told(served.engine.with_sessions(lambda s: s.of(tenant)))
        ]
        found.sort(key=lambda one: one.last_used, reverse=True)
        if after is not None:
            names = [one.name for one in found]
            if after not in names:
                raise _unknown(after)
            found = found[names.index(after) + 1 :]
        return reply(_listed(found[:limit]) | {"has_more": len(found) > limit})

    async def get_session(self, request: Request) -> Response:
        name, tenant = _named(request)
        return reply(_shown(await self._ask(lambda s: s.info(name, tenant))))

    async def update_session(self, request: Request) -> Response:
        name, tenant = _named(request)
        asked = decode(await self._body(request), SessionRequest)
        if asked.id not in (None, name):
            raise invalid_value("id", "A session keeps its id; fork it to go on under another one.")
        hints = _hints(asked)
        return reply(_shown(await self._ask(lambda s: s.hint(name, tenant, hints))))

    async def fork_session(self, request: Request) -> Response:
        name, tenant = _named(request)
        asked = decode(await self._body(request), ForkRequest)
        count = 1 if asked.n is None else asked.n
        if not 1 <= count <= MAX_FORKS:
            raise invalid_value("n", f"n must be from 1 to {MAX_FORKS}, got {count}.")
        if asked.id is not None and count > 1:
            raise invalid_value("id", "An id is of one session; leave it out where n is above 1.")
        new = [_name(asked.id) for _ in range(count)]
        return reply(_listed(await self._ask(lambda s: s.fork(name, new, tenant))))

    async def delete_session(self, request: Request) -> Response:
        name, tenant = _named(request)
        await self._ask(lambda s: s.delete(name, tenant))
        return reply({"id": name, "object": "session.deleted", "deleted": True})

    async def _body(self, request: Request) -> bytes:
        """All fields may be left out, and so may all of it."""
        return await read_body(request.scope, request.receive, self.max_body_bytes) or b"{}"

    async def _ask(self, task: Callable[[Sessions], Got]) -> Got:
        """Of the model that has the session."""
        missing = InputError("session", "There is no session of any model that is loaded.")
        for served in self.models.loaded:
            try:
                return await _told(served.engine.with_sessions(task))
            except NoSessionError as error:
                missing = error
        raise ApiError(404, str(missing), "id", "session_not_found")


async def _told(asked: Awaitable[Got]) -> Got:
    """Its errors as those of this API."""
    try:
        return await asked
    except InputError as error:
        if error.field != "session" or isinstance(error, NoSessionError):
            raise
        raise invalid_value("id", f"id{str(error).removeprefix('session')}") from None


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["id"], tenant_of(request.scope)


def _name(given: str | None) -> str:
    return f"sess_{uuid.uuid4().hex}" if given is None else given


def _hints(asked: SessionRequest) -> Hints:
    return Hints(asked.expect_return_s, asked.ttl_s, asked.pause_kind)


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"There is no session {name[:200]!r}.", "after", "session_not_found")


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= limit <= MAX_LIMIT:
        raise invalid_value("limit", f"limit must be from 1 to {MAX_LIMIT}, got {text[:100]!r}.")
    return limit


def _listed(found: list[SessionInfo]) -> dict[str, Any]:
    return {"object": "list", "data": [_shown(one) for one in found]}


def _shown(info: SessionInfo) -> dict[str, Any]:
    since = time.time() - time.monotonic()
    tokens = {"total": info.num_tokens, "leased": info.leased_tokens}
    if info.tokens_in_memory is not None:
        tokens |= {"memory": info.tokens_in_memory, "below": info.tokens_below or 0}
    return {
        "id": info.name,
        "object": "session",
        "created_at": int(since + info.created),
        "last_used_at": int(since + info.last_used),
        "expires_at": int(since + info.expires),
        "turns": info.turns,
        "running": info.running,
        "expect_return_s": info.expect_return_s,
        "tokens": tokens,
    }
