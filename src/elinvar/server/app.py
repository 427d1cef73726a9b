"""The HTTP application.

Owns which endpoints and layers there are, /health, /ready, /metrics, and the start and end of the engines'
threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from elinvar.base.errors import EngineError
from elinvar.base.exposition import expose
from elinvar.server import openapi
from elinvar.server.adapters import AdapterRoutes
from elinvar.server.anthropic import AnthropicRoutes
from elinvar.server.console import Console
from elinvar.server.door import Door, http_exception
from elinvar.server.errors import unavailable
from elinvar.server.explain import ExplainRoutes
from elinvar.server.live import Live
from elinvar.server.metrics import CONTENT_TYPE, HTTPMetrics
from elinvar.server.models import Models
from elinvar.server.ollama import OllamaRoutes
from elinvar.server.ollama_models import OllamaModelRoutes, Shown, shown_of
from elinvar.server.ollama_texts import OllamaTextRoutes
from elinvar.server.openai import OpenAIRoutes
from elinvar.server.process import GRACE_S
from elinvar.server.reply import reply
from elinvar.server.seen import Teller, Telling, Witness
from elinvar.server.served import Served
from elinvar.server.sessions import SessionRoutes
from elinvar.server.sleep import SleepRoutes
from elinvar.server.state import State, StateOptions
from elinvar.server.tenants import NOBODY, Keys, Tenants, is_admin
from elinvar.server.texts import TextRoutes
from elinvar.server.tokenize import TokenizeRoutes, version
from elinvar.server.trace import TraceFile
from elinvar.server.watchdog import HUNG_S, Steps, Watchdog

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.text_aio import AsyncTextModel

MAX_WAITING = 1024
MAX_BODY_BYTES = 16 * 2**20
DEFAULT_ROWS = 8
"""Lines of batches that run at once where no model is there to say how many it runs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What applications of all kinds have."""

    max_waiting: int = MAX_WAITING
    """Beyond the rows that run, so many answers may wait; more get a 429."""
    max_body_bytes: int = MAX_BODY_BYTES
    grace_seconds: float = GRACE_S
    """How long what runs may go on when the application ends."""
    tenants: Tenants = NOBODY
    """Those whose keys are asked for; their limits are the engine's (EngineConfig.tenants)."""
    admin_port: int | None = None
    """See tenants.Keys."""
    cors_origins: tuple[str, ...] = ()
    """Pages of these origins may ask from browsers; `*`: all."""
    hung_s: float = HUNG_S
    """A step that takes longer hangs."""
    console: bool = True
    """Browsers get it at /."""
    state_dir: Path | None = None
    """Where responses, files and batches are kept; None: nowhere that outlives the server."""
    tellers: tuple[Teller, ...] = ()
    """They are told of every request that ended."""


def create_app(
    engine: AsyncEngine,
    model_name: str,
    *,
    allow_adapter_loading: bool = False,
    trace: TraceFile | None = None,
    **settings: Any,
) -> Starlette:
    """The application that serves `engine` under the name `model_name`, and its adapters under their
    own: see create_models_app. settings: fields of Settings."""
    chosen = Settings(**settings)
    models = Models.of(Served.of(model_name, engine, chosen.max_waiting))
    if trace is not None:
        engine.engine.watchers.append(trace)
    return create_models_app(
        models, chosen, allow_adapter_loading=allow_adapter_loading, trace=trace
    )


def create_models_app(
    models: Models,
    settings: Settings,
    *,
    allow_adapter_loading: bool = False,
    trace: TraceFile | None = None,
    texts: TextRoutes | None = None,
) -> Starlette:
    """The application that serves models which generate text. Its lifespan starts their engines and
    lets what runs finish at the end.

    texts: of the model for vectors or scores that is beside them (see Models). allow_adapter_loading:
    clients may load adapters from folders here, and unload them. trace: closed at the end; told of
    requests by whoever loads a model."""
    limit = settings.max_body_bytes
    metrics = HTTPMetrics(lambda: sum(one.service.num_live for one in models.loaded))
    routes = OpenAIRoutes(models, limit).routes()
    routes += AnthropicRoutes(models, limit).routes()
    routes += OllamaRoutes(models, limit).routes()
    embedding = None if texts is None else OllamaTextRoutes(texts, limit)
    if texts is not None and embedding is not None:
        routes += [*texts.routes_beside(), *embedding.routes_beside()]

    def shown(scope: Scope) -> list[Shown]:
        return shown_of(models, scope) + ([] if embedding is None else embedding.shown(scope))

    routes += OllamaModelRoutes(shown, limit).routes()
    if allow_adapter_loading:
        routes += AdapterRoutes(models, limit).routes()
    routes += ExplainRoutes(lambda: [s.service.explanations for s in models.loaded]).routes()
    routes += SessionRoutes(models, limit).routes()
    routes += SleepRoutes(models).routes()
    live = Live(lambda: models.loaded)
    routes += live.routes()
    if settings.console:
        routes += Console().routes()
    routes += TokenizeRoutes(models, limit).routes()

    def more_metrics(tenants: bool) -> bytes:
        return expose({served.name: served.core.metrics for served in models.loaded}, tenants)

    def engines() -> list[AsyncEngine]:
        return [served.engine for served in models.loaded]

    rows = max((one.core.config.max_rows for one in models.loaded), default=DEFAULT_ROWS)
    kept = State(StateOptions(settings.state_dir, limit, rows))

    def has(scope: Scope, name: str) -> bool:
        return models.has(scope, name) or (texts is not None and texts.has(scope, name))

    routes += kept.routes(routes, has, models)
    ended = (lambda: None) if trace is None else trace.close
    ends = live.close, ended
    return _application(models, routes, metrics, more_metrics, settings, engines, kept, *ends)


def create_text_app(
    engine: AsyncTextModel, model_name: str, *, matryoshka: bool = False, **settings: Any
) -> Starlette:
    """The same for an embedding model or a reranker. `max_waiting`: texts. `matryoshka`: clients may
    shorten vectors, whatever config.json says of it."""
    chosen = Settings(**settings)
    metrics = HTTPMetrics(lambda: engine.num_live)
    shorten = matryoshka or engine.model.recipe.matryoshka
    limits = chosen.max_waiting, chosen.max_body_bytes
    texts = TextRoutes(engine, model_name, shorten, *limits)
    routes = [*texts.routes(), *OllamaTextRoutes(texts, chosen.max_body_bytes).routes()]
    kept = State(StateOptions(chosen.state_dir, chosen.max_body_bytes))
    routes += kept.routes(routes, texts.has)
    return _application(_Alone(engine), routes, metrics, lambda _: b"", chosen, list, kept)


class _Runs(Protocol):
    """What the application starts and stops."""

    async def start(self) -> None: ...

    async def shutdown(self, timeout_s: float) -> None: ...

    def check_alive(self) -> None: ...

    def check_awake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Alone:
    engine: AsyncTextModel

    async def start(self) -> None:
        self.engine.start()

    async def shutdown(self, timeout_s: float) -> None:
        await self.engine.shutdown(timeout_s)

    def check_alive(self) -> None:
        self.engine.check_alive()

    def check_awake(self) -> None:
        """It never sleeps."""


def _application(
    runs: _Runs,
    routes: Sequence[Route],
    metrics: HTTPMetrics,
    more_metrics: Callable[[bool], bytes],
    settings: Settings,
    engines: Callable[[], Sequence[Steps]],
    kept: State,
    watching: Callable[[], None] = lambda: None,
    ended: Callable[[], None] = lambda: None,
) -> Starlette:
    """more_metrics: those of the engines, with tenants or without. watching: ends the streams that
    would never end by themselves. ended: called at the very end.

    app.state.leave(): /ready is 503 from then on, for those who send requests to learn that it ends
    soon. app.state.tenants: those of now."""
    watchdog = Watchdog(settings.hung_s)
    state = {"started": False, "leaving": False}

    async def health(request: Request) -> Response:
        """Whether it does what it should; a process that does not is to be replaced."""
        if not state["started"]:
            raise unavailable("The server is not ready.")
        try:
            runs.check_alive()
        except EngineError as error:
            raise unavailable(str(error)) from error
        if any(watchdog.hangs(engine) for engine in engines()):
            raise unavailable("A step hangs; the log says where.")
        return reply({"status": "ok"})

    async def ready(request: Request) -> Response:
        """Whether it is to be sent requests."""
        if state["leaving"]:
            raise unavailable("The server is shutting down.")
        runs.check_awake()
        return await health(request)

    async def show_metrics(request: Request) -> Response:
        text = metrics.expose() + more_metrics(is_admin(request.scope))
        return Response(text, media_type=CONTENT_TYPE)

    def tenants_of_now() -> Tenants:
        now: Tenants = app.state.tenants
        return now

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await runs.start()
        kept.tenants = tenants_of_now
        await kept.start()
        state["started"] = True
        try:
            async with watchdog.watching(engines):
                yield
        finally:
            state["started"] = False
            await kept.shutdown()
            await runs.shutdown(settings.grace_seconds)
            await telling.close()
            ended()

    def leave() -> None:
        state["leaving"] = True
        watching()

    keys = Middleware(
        Keys, tenants_of_now, admin_port=settings.admin_port, origins=settings.cors_origins
    )
    telling = Telling(settings.tellers)
    layers = [Middleware(Witness, telling=telling), Middleware(Door, metrics=metrics), keys]
    if settings.cors_origins:  # around the door, which writes the errors: pages read them, too
        layers.insert(1, _cors(settings.cors_origins))
    app = Starlette(
        routes=[
            *routes,
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            Route("/metrics", show_metrics, methods=["GET"]),
            openapi.route(),
        ],
        middleware=layers,
        exception_handlers={HTTPException: http_exception},
        lifespan=lifespan,
    )
    app.state.leave = leave
    app.state.tenants = settings.tenants
    app.router.redirect_slashes = False
    return app


def _cors(origins: Sequence[str]) -> Middleware:
    exposed = ["x-request-id", "server-timing", "retry-after"]
    return Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=exposed,
    )
