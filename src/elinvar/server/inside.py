"""Requests that come from inside: lines of batches, run by the endpoints that clients use.

No socket and no key: whose they are is known, and nobody waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from elinvar.base.handling import Handling
from elinvar.server.errors import INTERNAL, as_api_error
from elinvar.server.seen import CURRENT

ScopeOf = Callable[[str, str], dict[str, Any]]
"""What requests of a tenant have, whoever sends them, from (tenant, request id)."""

log = logging.getLogger(__name__)


def handled(scope: Scope, handling: Handling) -> Handling:
    """What comes from inside yields to whom somebody waits for."""
    return replace(handling, service="batch") if "elinvar.inside" in scope else handling


@dataclass(frozen=True, slots=True)
class Inside:
    """The endpoints, by their paths."""

    apps: Mapping[str, ASGIApp]
    scope_of: ScopeOf

    @classmethod
    def of(cls, routes: Iterable[Route], paths: Iterable[str], scope_of: ScopeOf) -> Inside:
        """Those of `paths` that there are."""
        wanted = set(paths)
        apps = {route.path: route.app for route in routes if route.path in wanted}
        return cls(apps, scope_of)

    async def post(
        self, path: str, body: bytes, tenant: str, request_id: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) of the answer. Cancelling ends what it runs."""
        scope = self.scope_of(tenant, request_id)
        scope |= {"method": "POST", "path": path, "headers": [], "query_string": b""}
        scope |= {"path_params": {}, "elinvar.inside": True}
        sent, parts = [], []
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await asyncio.Event().wait()  # the client never leaves
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.append(message)
            else:
                parts.append(message.get("body", b""))

        CURRENT.set(None)  # whoever began the batch is not who asks
        try:
            await self.apps[path](scope, receive, send)
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                log.exception("Unexpected error in request %s.", request_id)
                known = INTERNAL
            return known.status, known.body(), known.headers
        finally:
            for release in scope.get("elinvar.releases", ()):
                release()
        (start,) = sent
        headers = {name.decode(): value.decode() for name, value in start.get("headers", [])}
        return start["status"], b"".join(parts), headers
