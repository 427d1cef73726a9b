"""The OpenAI endpoints: models, chat completions, completions.

Owns the order of the checks: body, schema, model, parameters, prompt, room. All of them come
before the first byte of the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.base.handling import Handling
from elinvar.server import prepare
from elinvar.server.answer import Answer
from elinvar.server.anthropic_models import model_info, model_list
from elinvar.server.asked import Asked
from elinvar.server.body import read_body
from elinvar.server.chats import ask_chat
from elinvar.server.completions import ask_completion, echo_shift
from elinvar.server.error_shapes import is_anthropic
from elinvar.server.inside import handled
from elinvar.server.models import Models
from elinvar.server.openai_messages import conversation
from elinvar.server.reply import reply
from elinvar.server.schema import ChatRequest, CompletionRequest, decode
from elinvar.server.searched import beams
from elinvar.server.served import Target
from elinvar.server.tenants import tenant_of
from elinvar.server.wire import ChatWire, CompletionWire, OpenAIWire


@dataclass(frozen=True, slots=True)
class OpenAIRoutes:
    """The models under the OpenAI API."""

    models: Models
    max_body_bytes: int

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.get_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def list_models(self, request: Request) -> Response:
        models, scope = self.models, request.scope
        data = [models.describe(scope, name) for name in models.names_for(scope)]
        return reply(model_list(data) if is_anthropic(scope) else {"object": "list", "data": data})

    async def get_model(self, request: Request) -> Response:
        described = self.models.describe(request.scope, request.path_params["model"])
        return reply(model_info(described) if is_anthropic(request.scope) else described)

    async def chat(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        parsed = decode(body, ChatRequest)
        target = await self.models.use(request.scope, parsed.model)
        wanted = prepare.wanted(parsed)
        handling = _handling(target, parsed, request)
        asked = await ask_chat(target, conversation(parsed), wanted, handling)
        return _answer(target, asked, parsed, ChatWire)

    async def completions(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        parsed = decode(body, CompletionRequest)
        target = await self.models.use(request.scope, parsed.model)
        wanted = prepare.wanted(parsed)
        handling = _handling(target, parsed, request)
        asked = await ask_completion(target, parsed, wanted, handling)
        wire = partial(CompletionWire, shift=echo_shift(asked))
        return _answer(target, asked, parsed, wire)


def _handling(
    target: Target, parsed: ChatRequest | CompletionRequest, request: Request
) -> Handling:
    scope, policy = request.scope, target.served.core.config.policy
    return handled(scope, prepare.handling(parsed, tenant_of(scope), policy))


def _answer(
    target: Target,
    asked: Asked,
    parsed: ChatRequest | CompletionRequest,
    kind: Callable[..., OpenAIWire],
) -> Answer:
    served = target.served
    asked = replace(asked, beams=beams(parsed, asked.choices[0].params))
    wire = kind(
        parsed.model,
        served.core.fingerprint_of(target.adapter),
        served.names,
        with_usage=prepare.stream_usage(parsed),
        with_logprobs=prepare.num_logprobs(parsed) is not None,
        service_tier=prepare.tier_used(parsed),
    )
    return Answer(asked, wire, stream=bool(parsed.stream))
