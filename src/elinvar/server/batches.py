"""/v1/batches: many requests in a file, run when nobody else wants the engine.

What is stored is `batch_state`'s, how lines run is `batch_runner`'s.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.server.batch_runner import Runner
from elinvar.server.batch_state import Batches, Body
from elinvar.server.body import read_body
from elinvar.server.errors import ApiError, invalid_value, not_supported
from elinvar.server.file_store import Files
from elinvar.server.files import read_age
from elinvar.server.pages import Page
from elinvar.server.reply import reply
from elinvar.server.responses_request import check_metadata
from elinvar.server.schema import decode
from elinvar.server.tenants import tenant_of

ENDPOINTS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
WINDOW_S = 24 * 3600
_OVER = "failed", "completed", "expired", "cancelled"
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class Expiry(msgspec.Struct, forbid_unknown_fields=True):
    anchor: str
    seconds: int


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: Expiry | None = None


@dataclass(frozen=True, slots=True)
class BatchRoutes:
    batches: Batches
    files: Files
    runner: Runner
    endpoints: frozenset[str]
    """Those of `ENDPOINTS` that this server has."""
    max_body_bytes: int

    def routes(self) -> list[Route]:
        one = "/v1/batches/{id}"
        return [
            Route("/v1/batches", self.create_batch, methods=["POST"]),
            Route("/v1/batches", self.list_batches, methods=["GET"]),
            Route(one, self.get_batch, methods=["GET"]),
            Route(f"{one}/cancel", self.cancel_batch, methods=["POST"]),
        ]

    async def create_batch(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        asked = decode(body, BatchRequest)
        if asked.endpoint not in self.endpoints:
            there = f"there is {', '.join(sorted(self.endpoints))}"
            raise not_supported("endpoint", f"A batch of {asked.endpoint[:200]!r}", there)
        if asked.completion_window != "24h":
            raise invalid_value("completion_window", "completion_window must be 24h.")
        check_metadata(asked.metadata)
        expiry, age_s = asked.output_expires_after, None
        if expiry is not None:
            age_s = read_age(expiry.anchor, expiry.seconds, "output_expires_after")
        tenant, batch = tenant_of(request.scope), _new(asked, age_s)
        await self.batches.create(tenant, batch)
        self.runner.begin(tenant, batch["id"])
        return reply(_shown(batch))

    async def list_batches(self, request: Request) -> Response:
        page = Page.of(request)
        found = await self.batches.of(tenant_of(request.scope))
        if page.order == "asc":
            found.reverse()
        return reply(page.cut([_shown(one) for one in found]))

    async def get_batch(self, request: Request) -> Response:
        tenant, name = tenant_of(request.scope), request.path_params["id"]
        return reply(_shown(await self.batches.get(tenant, name)))

    async def cancel_batch(self, request: Request) -> Response:
        tenant, name = tenant_of(request.scope), request.path_params["id"]
        await self.batches.get(tenant, name)
        batch = await self.batches.update(name, _cancel)
        self.runner.stop_lines(name)
        return reply(_shown(batch))

    async def resume(self) -> None:
        """What had not ended when the server did."""
        for tenant, batch in await self.batches.active():
            self.runner.begin(tenant, batch["id"])


def _new(asked: BatchRequest, age_s: float | None) -> Body:
    now = int(time.time())
    counts = ("input_tokens", "output_tokens", "total_tokens")
    return {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": asked.endpoint,
        "errors": None,
        "input_file_id": asked.input_file_id,
        "completion_window": asked.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + WINDOW_S,
        **{f"{name}_at": None for name in _TIMES},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": asked.metadata,
        "model": None,
        "usage": {
            **dict.fromkeys(counts, 0),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
        "output_expires_after": age_s,
    }


def _cancel(body: Body) -> None:
    if body["status"] in (*_OVER, "finalizing"):
        message = f"A batch that is {body['status']} cannot be cancelled."
        raise ApiError(409, message, "batch_id", "invalid_status")
    if body["status"] != "cancelling":
        body |= {"status": "cancelling", "cancelling_at": int(time.time())}


def _shown(body: Body) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "output_expires_after"}
