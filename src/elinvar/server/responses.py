"""/v1/responses: OpenAI's API of items, with conversations that the server keeps.

A request becomes a chat (`responses_request`) and its answer items and events (`responses_wire`); what
is stored is `responses_state`'s, what runs without a client `responses_background`'s.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Scope

from elinvar.engine.seeds import draw_seed
from elinvar.server.answer import SSE_HEADERS, Answer
from elinvar.server.asked import Asked
from elinvar.server.body import read_body
from elinvar.server.errors import bad_request, invalid_value
from elinvar.server.inside import ScopeOf
from elinvar.server.models import Models
from elinvar.server.pages import Page
from elinvar.server.reply import encode, reply
from elinvar.server.responses_ask import ask_response
from elinvar.server.responses_background import Background, Run
from elinvar.server.responses_items import Item, read_items
from elinvar.server.responses_request import (
    check_harmless,
    check_supported,
    shown,
    with_logprobs,
)
from elinvar.server.responses_schema import INCLUDED, InputTokensRequest, ResponseRequest
from elinvar.server.responses_state import Kept, Responses
from elinvar.server.responses_wire import ResponseWire
from elinvar.server.schema import decode
from elinvar.server.served import Target
from elinvar.server.tenants import tenant_of


@dataclass(frozen=True, slots=True)
class ResponseRoutes:
    models: Models
    responses: Responses
    background: Background
    scope_of: ScopeOf
    max_body_bytes: int

    def routes(self) -> list[Route]:
        one = "/v1/responses/{id}"
        return [
            Route("/v1/responses", self.create_response, methods=["POST"]),
            Route("/v1/responses/input_tokens", self.count_input_tokens, methods=["POST"]),
            Route(one, self.get_response, methods=["GET"]),
            Route(one, self.delete_response, methods=["DELETE"]),
            Route(f"{one}/cancel", self.cancel_response, methods=["POST"]),
            Route(f"{one}/input_items", self.list_input_items, methods=["GET"]),
        ]

    async def create_response(self, request: Request) -> Any:
        scope = request.scope
        parsed = decode(await self._body(request), ResponseRequest)
        check_supported(parsed)
        tenant = tenant_of(scope)
        said, given = await self._items(tenant, parsed)
        target = await self.models.use(scope, parsed.model)
        # What is wrong with it is told now, of what runs later, too.
        asked = await ask_response(target, scope, parsed, [*said, *given])
        if parsed.background:
            return await self._run_later(scope, parsed, target, given)
        wire = _wire(f"resp_{uuid.uuid4().hex}", target, parsed)

        async def keep() -> None:
            await self.responses.save(Kept(tenant, wire.result, given))

        stored = None if parsed.store is False else keep
        return Answer(asked, wire, bool(parsed.stream), stored)

    async def count_input_tokens(self, request: Request) -> Response:
        counted = decode(await self._body(request), InputTokensRequest)
        check_harmless(counted)
        names = set(ResponseRequest.__struct_fields__) & set(counted.__struct_fields__)
        parsed = ResponseRequest(**{name: getattr(counted, name) for name in names})
        said, given = await self._items(tenant_of(request.scope), parsed)
        target = await self.models.use(request.scope, parsed.model)
        asked = await ask_response(target, request.scope, parsed, [*said, *given])
        count = len(asked.choices[0].prompt_ids)
        return reply({"object": "response.input_tokens", "input_tokens": count})

    # ---- stored ones ----------------------------------------------------------------------------

    async def get_response(self, request: Request) -> Response:
        name, tenant = _named(request)
        query = request.query_params
        for included in (*query.getlist("include"), *query.getlist("include[]")):
            if included not in INCLUDED:
                raise invalid_value("include", f"include takes {', '.join(INCLUDED)}.")
        run = self.background.of(tenant, name)
        if query.get("stream") == "true":
            after = _after(request)
            if run is not None:
                return _streamed(run.follow(after + 1))
            events = await self.responses.events(tenant, name)
            return _streamed(_one(b"".join(events[after + 1 :])))
        if run is not None:
            return reply(run.shown)
        return Response(await self.responses.get(tenant, name), media_type="application/json")

    async def delete_response(self, request: Request) -> Response:
        name, tenant = _named(request)
        if (run := self.background.of(tenant, name)) is not None:
            await self.background.cancel(run)
        await self.responses.delete(tenant, name)
        return reply({"id": name, "object": "response", "deleted": True})

    async def cancel_response(self, request: Request) -> Response:
        name, tenant = _named(request)
        if (run := self.background.of(tenant, name)) is not None:
            await self.background.cancel(run)
        body = await self.responses.get(tenant, name)
        if not msgspec.json.decode(body)["background"]:
            raise bad_request("Only a response that runs in the background can be cancelled.")
        return Response(body, media_type="application/json")

    async def list_input_items(self, request: Request) -> Response:
        name, tenant = _named(request)
        page = Page.of(request)
        items = await self.responses.inputs(tenant, name)
        if page.order == "desc":
            items.reverse()
        return reply(page.cut(items))

    # ---- what runs in the background ------------------------------------------------------------

    async def _run_later(
        self, scope: Scope, parsed: ResponseRequest, target: Target, given: list[Item]
    ) -> Response:
        self.background.check_room(tenant_of(scope))
        if parsed.seed is None:
            parsed.seed = draw_seed()
        wire = _wire(f"resp_{uuid.uuid4().hex}", target, parsed)
        run = self._make(tenant_of(scope), scope["elinvar.request_id"], parsed, wire, given)
        await self.background.begin(run)
        return _streamed(run.follow(0)) if parsed.stream else reply(run.shown)

    async def resume(self) -> None:
        """What had not ended when the server did. What no model is here for ends as failed."""
        for name, tenant, created, raw, given in await self.responses.open():
            parsed = msgspec.json.decode(raw, type=ResponseRequest)
            wire = _wire(name, None, parsed, int(created))
            run = self._make(tenant, name, parsed, wire, given)
            run.add(run.wire.begin(queued=True))
            self.background.go(run)

    def _make(
        self,
        tenant: str,
        request_id: str,
        parsed: ResponseRequest,
        wire: ResponseWire,
        given: list[Item],
    ) -> Run:
        scope = self.scope_of(tenant, request_id)

        @asynccontextmanager
        async def ask() -> AsyncIterator[Asked]:
            said, _ = await self.responses.before(tenant, parsed.previous_response_id, ())
            async with self.models.using(scope, parsed.model) as target:
                wire.output.names = target.served.names
                yield await ask_response(target, scope, parsed, [*said, *given])

        parsed.input = None  # its items are stored by themselves
        return Run(tenant, request_id, wire, ask, given, encode(parsed))

    # ---- from a request to what is asked --------------------------------------------------------

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self.max_body_bytes)

    async def _items(self, tenant: str, parsed: ResponseRequest) -> tuple[list[Item], list[Item]]:
        """(what was said before, what this request adds)."""
        if parsed.input is None and parsed.previous_response_id is None:
            raise bad_request("Missing required parameter: 'input'.", "input")
        given = [] if parsed.input is None else read_items(parsed.input)
        return await self.responses.before(tenant, parsed.previous_response_id, given)


def _wire(
    name: str, target: Target | None, parsed: ResponseRequest, created_at: int | None = None
) -> ResponseWire:
    """target None: its names come later."""
    return ResponseWire(
        name,
        shown(parsed),
        None if target is None else target.served.names,
        with_logprobs=with_logprobs(parsed),
        sealed=INCLUDED[1] in (parsed.include or ()),
        created_at=created_at,
    )


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["id"], tenant_of(request.scope)


def _after(request: Request) -> int:
    text = request.query_params.get("starting_after", "-1")
    if text != "-1" and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise invalid_value("starting_after", "starting_after must be the number of an event.")
    return int(text)


def _streamed(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, headers=SSE_HEADERS, media_type="text/event-stream")


async def _one(events: bytes) -> AsyncIterator[bytes]:
    yield events
