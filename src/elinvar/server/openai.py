"""The OpenAI endpoints: models, chat completions, completions.

Owns the order of the checks: body, schema, model, parameters, prompt, room. All of them come
before the first byte of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.base.handling import Handling
from elinvar.server import prepare
from elinvar.server.answer import Answer
from elinvar.server.anthropic_models import model_info, model_list
from elinvar.server.asked import Asked
from elinvar.server.body import read_body
from elinvar.server.chats import ask_chat, make_choices, run_sized
from elinvar.server.error_shapes import is_anthropic
from elinvar.server.openai_messages import conversation
from elinvar.server.reply import reply
from elinvar.server.schema import ChatRequest, CompletionRequest, decode
from elinvar.server.served import Models, Target
from elinvar.server.tenants import tenant_of
from elinvar.server.wire import ChatWire, CompletionWire, OpenAIWire

if TYPE_CHECKING:
    from elinvar.engine.tokenizer import Tokenizer


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
        models = self.models
        if is_anthropic(request.scope):
            return reply(model_list(models))
        data = [models.describe(name) for name in models.names]
        return reply({"object": "list", "data": data})

    async def get_model(self, request: Request) -> Response:
        described = self.models.describe(request.path_params["model"])
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
        core = target.served.core
        prompts = prepare.completion_prompts(parsed, core.model_config.vocab_size)
        field = "n" if len(prompts) == 1 else "prompt"
        target.served.service.check_count(len(prompts) * wanted.n, field, handling.tenant)
        size = sum(len(p) for p in prompts if isinstance(p, str))
        ids = await run_sized(size, partial(_encode_all, core.tokenizer), prompts)
        default = prepare.DEFAULT_COMPLETION_TOKENS
        choices = make_choices(target, wanted, ids, default, "prompt")
        return _answer(target, Asked(target.served, choices, handling), parsed, CompletionWire)


def _handling(
    target: Target, parsed: ChatRequest | CompletionRequest, request: Request
) -> Handling:
    return prepare.handling(parsed, tenant_of(request.scope), target.served.core.config.policy)


def _answer(
    target: Target,
    asked: Asked,
    parsed: ChatRequest | CompletionRequest,
    kind: type[OpenAIWire],
) -> Answer:
    served = target.served
    wire = kind(
        parsed.model,
        served.core.fingerprint_of(target.adapter),
        served.names,
        with_usage=prepare.stream_usage(parsed),
        with_logprobs=asked.choices[0].params.logprobs is not None,
        service_tier=prepare.tier_used(parsed),
    )
    return Answer(asked, wire, stream=bool(parsed.stream))


def _encode_all(tokenizer: Tokenizer, prompts: Sequence[prepare.Prompt]) -> list[list[int]]:
    return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
