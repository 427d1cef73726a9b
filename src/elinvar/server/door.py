"""What every request passes through: it gets an id, its errors the API's shape, and it is counted."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elinvar.server.error_shapes import error_body
from elinvar.server.errors import INTERNAL, ApiError, ClientGoneError, as_api_error, unavailable
from elinvar.server.metrics import HTTPMetrics

log = logging.getLogger(__name__)

ID_HEADERS = b"x-request-id", b"request-id"
"""OpenAI's name of the request's id, and Anthropic's."""
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Door:
    """Every answer gets a request id, every error the API's shape."""

    def __init__(self, app: ASGIApp, metrics: HTTPMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["elinvar.request_id"] = request_id.decode()
        status = 499  # until something is sent: the client left first (nginx's number)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(name, request_id) for name in ID_HEADERS]
                message["headers"] = [*message["headers"], *named]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            pass
        except asyncio.CancelledError:
            # The server's grace is over. The task ends here, so the cancellation need not go on.
            log.warning("Request %s was cut off by the shutdown.", request_id.decode())
            if status == 499:
                answer = unavailable("The server is shutting down.")
                await _error_response(answer, scope)(scope, receive, send_with_id)
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                log.exception("Unexpected error in request %s.", request_id.decode())
            if status == 499:
                response = _error_response(known or INTERNAL, scope)
                await response(scope, receive, send_with_id)
        finally:
            for release in scope.get("elinvar.releases", ()):
                release()
            endpoint = scope.get("endpoint")
            route = getattr(endpoint, "__name__", "unknown")
            self._metrics.count(route, status)


def _request_id(scope: Scope) -> bytes:
    """The client's x-request-id, if it can be repeated in a header and a log; a new one if not."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return f"req_{uuid.uuid4().hex}".encode()


def _error_response(error: ApiError, scope: Scope) -> Response:
    body = error_body(error, scope)
    return Response(body, error.status, error.headers, "application/json")


async def http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown path, wrong method."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        # Of all routes of the path: Starlette names those of the first.
        methods: set[str] = set()
        for route in request.app.routes:
            if isinstance(route, Route) and route.path_regex.match(request.scope["path"]):
                methods |= route.methods or set()
        error = HTTPException(405, headers={"Allow": ", ".join(sorted(methods))})
    if isinstance(error, HTTPException) and error.status_code == 404:
        known = {route.path: None for route in request.app.routes if isinstance(route, Route)}
        there = ", ".join(path for path in known if "{" not in path)
        asked = f"{request.method} {request.url.path[:200]}"
        error = HTTPException(404, f"{asked}; this server has {there}")
    return _error_response(as_api_error(error) or INTERNAL, request.scope)
