"""The endpoints of Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.server.answer import Answer
from elinvar.server.anthropic_messages import (
    OWN_NAMES,
    conversation,
    has_cache_control,
    wanted,
    wants_thoughts,
)
from elinvar.server.anthropic_schema import CountTokensRequest, MessagesRequest
from elinvar.server.anthropic_wire import MessagesWire
from elinvar.server.body import read_body
from elinvar.server.chats import ask_chat, encode_chat, thinking_way
from elinvar.server.errors import own_names
from elinvar.server.inside import handled
from elinvar.server.models import Models
from elinvar.server.prepare import hinted
from elinvar.server.reply import reply
from elinvar.server.schema import decode
from elinvar.server.tenants import tenant_of


@dataclass(frozen=True, slots=True)
class AnthropicRoutes:
    models: Models
    max_body_bytes: int

    def routes(self) -> list[Route]:
        return [
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
        ]

    async def messages(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        parsed = decode(body, MessagesRequest)
        target = await self.models.use(request.scope, parsed.model)
        with own_names(OWN_NAMES):
            policy = target.served.core.config.policy
            scope = request.scope
            handling = handled(scope, hinted(parsed, tenant_of(scope), policy))
            thinking, most = thinking_way(target.served, wants_thoughts(parsed))
            said = conversation(parsed, thinking)
            asked = await ask_chat(target, said, wanted(parsed, most), handling)
        wire = MessagesWire(
            parsed.model,
            request.scope["elinvar.request_id"],
            parsed.max_tokens,
            caches=has_cache_control(parsed),
            show_thoughts=getattr(parsed.thinking, "display", None) != "omitted",
        )
        return Answer(asked, wire, stream=bool(parsed.stream))

    async def count_tokens(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        parsed = decode(body, CountTokensRequest)
        target = await self.models.use(request.scope, parsed.model)
        with own_names(OWN_NAMES):
            thinking, _ = thinking_way(target.served, wants_thoughts(parsed))
            prompt, _ = await encode_chat(target.served, conversation(parsed, thinking))
        return reply({"input_tokens": len(prompt)})
