"""Requests that come from inside: lines of batches, run by the endpoints that clients use.

No socket and no key: whose they are is known, and nobody waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from elinvar.base.handling import Handling
from elinvar.server.errors import INTERNAL, as_api_error

log = logging.getLogger(__name__)


def handled(scope: Scope, handling: Handling) -> Handling:
    """What comes from inside yields to whom somebody waits for."""
    return replace(handling, service="batch") if "elinvar.inside" in scope else handling


@dataclass(frozen=True, slots=True)
class Inside:
    """The endpoints, by their paths."""

    apps: Mapping[str, ASGIApp]

    @classmethod
    def of(cls, routes: Iterable[Route], paths: Iterable[str]) -> Inside:
        """Those of `paths` that there are."""
        wanted = set(paths)
        return cls({route.path: route.app for route in routes if route.path in wanted})

    async def post(
        self, path: str, body: bytes, tenant: str, request_id: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) of the answer. Cancelling ends what it runs."""
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [],
            "query_string": b"",
            "path_params": {},
            "elinvar.request_id": request_id,
            "elinvar.tenant": tenant,
            "elinvar.inside": True,
        }
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

        try:
            await self.apps[path](scope, receive, send)
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                log.exception("Unexpected error in request %s.", request_id)
                known = INTERNAL
            return known.status, known.body(), known.headers
        (start,) = sent
        headers = {name.decode(): value.decode() for name, value in start.get("headers", [])}
        return start["status"], b"".join(parts), headers
