"""The live picture: GET /live, once or as a stream, and POST /v1/requests/{id}/cancel.

Owns what is told of the models at this moment. It is computed at most once a second, however many
watch, and not at all while nobody does. It never waits for a step, so that it shows one that hangs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from elinvar import __version__
from elinvar.base.errors import EngineError
from elinvar.base.recent import WINDOW_S, Quantiles
from elinvar.server.errors import CANCELLED, invalid_value
from elinvar.server.explain import answer_id, not_found
from elinvar.server.reply import encode, reply
from elinvar.server.tenants import allowed_models, is_admin, tenant_of

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.core import Engine
    from elinvar.sched.request import Request as EngineRequest
    from elinvar.server.served import Served

JSON = dict[str, Any]
Names = frozenset[str] | None
"""Of models; None: all."""

RATE_S = 5.0
"""Over how long a rate is taken."""
EVERY_S = 1.0
MAX_REQUESTS = 256
"""Of a model, that are listed; the oldest."""
_SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Live:
    """models: those that run, whenever it is asked."""

    def __init__(self, models: Callable[[], Iterable[Served]]) -> None:
        self._models = models
        self._began = time.monotonic()
        self._second = -1
        self._made: dict[str | None, bytes] = {}
        """Of this second, by tenant."""
        self._closing = asyncio.Event()

    def routes(self) -> list[Route]:
        return [
            Route("/live", self.live, methods=["GET"]),
            Route("/v1/requests/{id:path}/cancel", self.cancel, methods=["POST"]),
        ]

    def close(self) -> None:
        """End the streams: who watches a server that stops must not hold it up."""
        self._closing.set()

    async def live(self, request: Request) -> Response:
        tenant, allowed = _seen(request), allowed_models(request.scope)
        history, stream = _flag(request, "history"), _flag(request, "stream")
        first = (
            self._snapshot(tenant, allowed, history=True)
            if history
            else self._current(tenant, allowed)
        )
        headers = {"Cache-Control": "no-store"}
        if not stream:
            return Response(first, headers=headers, media_type="application/json")
        headers["X-Accel-Buffering"] = "no"
        events = self._events(tenant, allowed, first)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream")

    async def _events(
        self, tenant: str | None, allowed: Names, snapshot: bytes
    ) -> AsyncIterator[bytes]:
        while not self._closing.is_set():
            yield b"data: " + snapshot + b"\n\n"
            try:
                async with asyncio.timeout(EVERY_S - time.monotonic() % EVERY_S):
                    await self._closing.wait()
            except TimeoutError:
                snapshot = self._current(tenant, allowed)

    def _current(self, tenant: str | None, allowed: Names) -> bytes:
        """The snapshot of this second."""
        second = int(time.monotonic() / EVERY_S)
        if second != self._second:
            self._second = second
            self._made.clear()
        made = self._made.get(tenant)
        if made is None:
            made = self._made[tenant] = self._snapshot(tenant, allowed)
        return made

    def _snapshot(self, tenant: str | None, allowed: Names, history: bool = False) -> bytes:
        now = time.monotonic()
        models = [one for one in self._models() if _may_see(one, allowed)]
        shown = [_model(one, tenant, now) for one in models]
        if history:
            for model, one in zip(shown, models, strict=True):
                model["history"] = _history(one.core, now)
        kv = sum(one.core.kv_bytes for one in models)
        body = {
            "time": time.time(),
            "uptime_s": now - self._began,
            "version": __version__,
            "models": shown,
            "memory": {"rss": _resident_bytes(), "kv": kv},
        }
        return encode(body)

    async def cancel(self, request: Request) -> Response:
        """Ends an answer of the tenant's, all choices of it."""
        wanted, tenant = request.path_params["id"], _seen(request)
        for one in self._models():
            found = one.service.explanations.open_choices(wanted, tenant)
            if found is not None:
                answer, choices = found
                ended = await one.engine.cancel(choices, CANCELLED) if choices else 0
                body = {"id": answer, "object": "request.cancelled", "cancelled": ended}
                return reply(body)
        raise not_found(wanted)


def _seen(request: Request) -> str | None:
    """The tenant whose requests are shown; None: all are."""
    return None if is_admin(request.scope) else tenant_of(request.scope)


def _may_see(one: Served, allowed: Names) -> bool:
    """Whether it is among the models that whoever asks may ask for."""
    return allowed is None or not allowed.isdisjoint([one.name, *one.core.adapters.names])


def _flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "0")
    if text not in ("0", "1"):
        raise invalid_value(name, f"{name} must be 0 or 1, got {text[:100]!r}.")
    return text == "1"


def _model(one: Served, tenant: str | None, now: float) -> JSON:
    core = one.core
    metrics, scheduler = core.metrics, core.scheduler
    recent, of_late = metrics.timeline.growth(RATE_S, now), metrics.timeline.growth(WINDOW_S, now)
    asked = of_late.asked_tokens
    return {
        "name": one.name,
        "state": _state(one.engine),
        "rows": {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "max": core.config.max_rows,
        },
        "kv": {"blocks": scheduler.kv.blocks, "tokens": scheduler.kv.max_sequence},
        "prefix_hit_rate": of_late.cached_tokens / asked if asked else None,
        "tokens_per_s": {
            "prompt": recent.prompt_tokens / RATE_S,
            "output": recent.output_tokens / RATE_S,
        },
        "ttft_ms": _quantiles(metrics.recent_ttft, now),
        "itl_ms": _quantiles(metrics.recent_itl, now),
        "step_ms": _quantiles(metrics.recent_steps, now),
        "requests": _requests(core.running(), tenant, now),
    }


def _state(engine: AsyncEngine) -> str:
    try:
        engine.check_alive()
    except EngineError:
        return "stopped"
    return "ready"


def _quantiles(times: Quantiles, now: float) -> JSON:
    found = times.at(list(_SHARES.values()), now)
    return {
        name: None if seconds is None else round(seconds * 1e3, 3)
        for name, seconds in zip(_SHARES, found, strict=True)
    }


def _requests(running: Sequence[EngineRequest], tenant: str | None, now: float) -> list[JSON]:
    """Of the tenant: others' are not its business. None: of all."""
    own = (one for one in running if tenant in (None, one.handling.tenant))
    return [
        {
            "id": answer_id(one.id),
            "tenant": one.handling.tenant,
            "state": one.ledger.state,
            "age_s": round(now - one.arrival, 3),
            "prompt_tokens": one.num_prompt_tokens,
            "cached_tokens": one.num_cached_tokens,
            "output_tokens": one.num_tokens - one.num_prompt_tokens,
            "session": one.handling.session,
        }
        for one, _ in zip(own, range(MAX_REQUESTS), strict=False)
    ]


def _history(core: Engine, now: float) -> JSON:
    """The last minutes, a number a second, in columns; the oldest first."""
    samples = core.metrics.timeline.seconds(int(WINDOW_S), now)
    return {
        "prompt": [one.prompt_tokens for one in samples],
        "output": [one.output_tokens for one in samples],
        "running": [one.running for one in samples],
        "waiting": [one.waiting for one in samples],
        "kv_usage": [round(one.kv_usage, 4) for one in samples],
    }


def _resident_bytes() -> int | None:
    """Of this process; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
