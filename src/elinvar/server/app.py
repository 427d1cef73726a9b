"""The HTTP application and the process that serves it.

Owns what every request passes through (request id, errors, counting), /health, /metrics, and the
start and end of the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elinvar.base.errors import EngineError
from elinvar.server import openapi
from elinvar.server.adapters import AdapterRoutes
from elinvar.server.anthropic import AnthropicRoutes
from elinvar.server.error_shapes import error_body
from elinvar.server.errors import INTERNAL, ApiError, ClientGoneError, as_api_error, unavailable
from elinvar.server.metrics import CONTENT_TYPE, HTTPMetrics
from elinvar.server.ollama import OllamaRoutes
from elinvar.server.ollama_models import OllamaModelRoutes, shown_of
from elinvar.server.ollama_texts import OllamaTextRoutes
from elinvar.server.openai import OpenAIRoutes
from elinvar.server.served import Models, Served
from elinvar.server.sessions import SessionRoutes
from elinvar.server.tenants import NOBODY, Keys, Tenants
from elinvar.server.texts import TextRoutes
from elinvar.server.trace import TraceFile

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.text_aio import AsyncTextModel

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

MAX_WAITING = 1024
MAX_BODY_BYTES = 16 * 2**20
ID_HEADERS = b"x-request-id", b"request-id"
"""OpenAI's name of the request's id, and Anthropic's."""
GRACE_SECONDS = 30
"""How long open answers may go on after SIGTERM or SIGINT."""


class Door:
    """The outermost layer: every answer gets a request id, every error the API's shape."""

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


async def _http_exception(request: Request, error: Exception) -> Response:
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


def create_app(
    engine: AsyncEngine,
    model_name: str,
    *,
    max_waiting: int = MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    grace_seconds: float = GRACE_SECONDS,
    allow_adapter_loading: bool = False,
    tenants: Tenants = NOBODY,
    trace: TraceFile | None = None,
) -> Starlette:
    """The application that serves `engine` under the name `model_name`, and its adapters under their
    own. allow_adapter_loading: clients may load them from folders here, and unload them. tenants: those
    whose keys are asked for; their limits are the engine's (EngineConfig.tenants). trace: told of every
    request that ends, and closed at the end.

    Its lifespan starts the engine's thread and, at the end, lets what runs finish for
    `grace_seconds`. Beyond the rows that run, `max_waiting` answers may wait; more get a 429.
    """
    core = engine.engine
    served = Served.of(model_name, engine, max_waiting)
    service = served.service
    metrics = HTTPMetrics(lambda: service.num_live)
    models = Models([served])
    routes = OpenAIRoutes(models, max_body_bytes).routes()
    routes += AnthropicRoutes(models, max_body_bytes).routes()
    routes += OllamaRoutes(models, max_body_bytes).routes()
    routes += OllamaModelRoutes(lambda: shown_of(models), max_body_bytes).routes()
    if allow_adapter_loading:
        routes += AdapterRoutes(engine, model_name, max_body_bytes).routes()
    routes += service.explanations.routes()
    routes += SessionRoutes(engine, max_body_bytes).routes()
    if trace is not None:
        core.watchers.append(trace)
    return _application(engine, routes, metrics, core.metrics.expose, grace_seconds, tenants, trace)


def create_text_app(
    engine: AsyncTextModel,
    model_name: str,
    *,
    max_waiting: int = MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    grace_seconds: float = GRACE_SECONDS,
    matryoshka: bool = False,
) -> Starlette:
    """The same for an embedding model or a reranker. `max_waiting`: texts. `matryoshka`: clients may
    shorten vectors, whatever config.json says of it."""
    metrics = HTTPMetrics(lambda: engine.num_live)
    shorten = matryoshka or engine.model.recipe.matryoshka
    api = TextRoutes(engine, model_name, shorten, max_waiting, max_body_bytes)
    routes = [*api.routes(), *OllamaTextRoutes(api, max_body_bytes).routes()]
    return _application(engine, routes, metrics, lambda: b"", grace_seconds)


class _Runs(Protocol):
    """What the application starts and stops."""

    def start(self) -> None: ...

    async def shutdown(self, timeout: float | None = None) -> None: ...

    def check_alive(self) -> None: ...


def _application(
    engine: _Runs,
    routes: Sequence[Route],
    metrics: HTTPMetrics,
    more_metrics: Callable[[], bytes],
    grace_seconds: float,
    tenants: Tenants = NOBODY,
    trace: TraceFile | None = None,
) -> Starlette:
    ready = False

    async def health(request: Request) -> Response:
        if not ready:
            raise unavailable("The server is not ready.")
        try:
            engine.check_alive()
        except EngineError as error:
            raise unavailable(str(error)) from error
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.expose() + more_metrics(), media_type=CONTENT_TYPE)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        nonlocal ready
        engine.start()
        ready = True
        try:
            yield
        finally:
            ready = False
            await engine.shutdown(grace_seconds)
            if trace is not None:
                trace.close()

    app = Starlette(
        routes=[
            *routes,
            Route("/health", health, methods=["GET"]),
            Route("/metrics", show_metrics, methods=["GET"]),
            openapi.route(),
        ],
        middleware=[Middleware(Door, metrics=metrics), Middleware(Keys, tenants=tenants)],
        exception_handlers={HTTPException: _http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def uvicorn_config(
    app: Starlette, *, log_level: str = "warning", grace_seconds: int = GRACE_SECONDS
) -> uvicorn.Config:
    """How the application is served; `host`, `port` or sockets are the caller's."""
    return uvicorn.Config(
        app,
        log_level=log_level,
        lifespan="on",
        ws="none",
        access_log=False,
        # Longer than clients (httpx: 5 s) and proxies (nginx: 60 s) keep idle connections, so that
        # it is never the server that closes one just as it is used again.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=grace_seconds,
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket for uvicorn; port 0 takes a free one. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    family, kind, protocol, _, address = found[0]
    # The protocol must be said: asyncio switches Nagle's algorithm off only for sockets that
    # say they are TCP, and with it a stream stalls for 40 ms again and again.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def serve(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    log_level: str = "warning",
    grace_seconds: int = GRACE_SECONDS,
) -> None:
    """Serve until SIGTERM or SIGINT; then open answers get `grace_seconds` to finish. Raises
    OSError when the address cannot be had."""
    config = uvicorn_config(app, log_level=log_level, grace_seconds=grace_seconds)
    uvicorn.Server(config).run(sockets=[listen(host, port)])
