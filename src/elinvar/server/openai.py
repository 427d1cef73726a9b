"""The OpenAI endpoints: models, chat completions, completions.

Owns the order of the checks: body, schema, model, parameters, prompt, room. All of them come
before the first byte of the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.base.handling import Handling
from elinvar.engine.seeds import choice_seed
from elinvar.server import prepare
from elinvar.server.answer import Answer
from elinvar.server.body import read_body
from elinvar.server.errors import invalid_value, unknown_model
from elinvar.server.schema import ChatRequest, CompletionRequest, decode
from elinvar.server.service import Choice, Service
from elinvar.server.tenants import tenant_of
from elinvar.server.tokens import TokenNames
from elinvar.server.wire import ChatWire, CompletionWire, Wire, encode

if TYPE_CHECKING:
    from elinvar.engine.core import Engine

Given = TypeVar("Given")
Ids = TypeVar("Ids")

_INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that the streams of others go on."""


class OpenAIRoutes:
    """One model under the OpenAI API."""

    def __init__(
        self, engine: Engine, service: Service, model_name: str, max_body_bytes: int
    ) -> None:
        self._engine = engine
        self._service = service
        self._model_name = model_name
        self._max_body_bytes = max_body_bytes
        self._names = TokenNames(engine.tokenizer)
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.get_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def list_models(self, request: Request) -> Response:
        names = [self._model_name, *self._engine.adapters.names]
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._adapter(name)
        return _json(self._model(name))

    async def chat(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, ChatRequest)
        wanted = self._wanted(parsed)
        handling = self._handling(parsed, request)
        self._service.check_count(wanted.n, "n", handling.tenant)
        messages = prepare.chat_messages(parsed)
        options, size = prepare.chat_options(parsed), prepare.text_length(messages)
        encode = partial(self._engine.encode_chat, options=options)
        prompt = await _run(size, encode, messages)
        choices = self._choices(wanted, [prompt], None, "messages")
        return self._answer(parsed, ChatWire, wanted, choices, handling)

    async def completions(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, CompletionRequest)
        wanted = self._wanted(parsed)
        handling = self._handling(parsed, request)
        prompts = prepare.completion_prompts(parsed, self._engine.model_config.vocab_size)
        field = "n" if len(prompts) == 1 else "prompt"
        self._service.check_count(len(prompts) * wanted.n, field, handling.tenant)
        size = sum(len(p) for p in prompts if isinstance(p, str))
        ids = await _run(size, self._encode_all, prompts)
        choices = self._choices(wanted, ids, prepare.DEFAULT_COMPLETION_TOKENS, "prompt")
        return self._answer(parsed, CompletionWire, wanted, choices, handling)

    def _wanted(self, parsed: ChatRequest | CompletionRequest) -> prepare.Wanted:
        adapter = self._adapter(parsed.model)
        wanted = prepare.wanted(parsed)
        return replace(wanted, params=replace(wanted.params, adapter=adapter))

    def _handling(self, parsed: ChatRequest | CompletionRequest, request: Request) -> Handling:
        return prepare.handling(parsed, tenant_of(request.scope), self._engine.config.policy)

    def _choices(
        self,
        wanted: prepare.Wanted,
        prompts: Sequence[list[int]],
        default_tokens: int | None,
        field: str,
    ) -> list[Choice]:
        """All choices of prompt 0 first, as OpenAI orders them.

        `default_tokens`: max_tokens where the client said nothing; None: as many as fit.
        """
        choices = []
        context = self._engine.context_of(wanted.params)
        for p, ids in enumerate(prompts):
            if not ids:
                raise invalid_value(field, f"{field} must hold at least one token.")
            room = prepare.fit(wanted.max_tokens, default_tokens, len(ids), context, field)
            for k in range(wanted.n):
                seed = wanted.params.seed
                seed = None if seed is None else choice_seed(seed, k)
                params = replace(wanted.params, max_tokens=room, seed=seed)
                choices.append(Choice(p * wanted.n + k, p, ids, params))
        return choices

    def _answer(
        self,
        parsed: ChatRequest | CompletionRequest,
        kind: type[Wire],
        wanted: prepare.Wanted,
        choices: Sequence[Choice],
        handling: Handling,
    ) -> Answer:
        fingerprint = self._engine.fingerprint_of(wanted.params.adapter)
        tier = prepare.tier_used(parsed)
        return Answer(
            service=self._service,
            wire=kind(parsed.model, fingerprint, self._names, wanted.stream_usage, tier),
            choices=choices,
            handling=handling,
            end_ids=self._engine.tokenizer.eos_ids,
            stream=bool(parsed.stream),
            with_usage=wanted.stream_usage,
        )

    def _encode_all(self, prompts: Sequence[prepare.Prompt]) -> list[list[int]]:
        encode_text = self._engine.tokenizer.encode
        return [encode_text(p) if isinstance(p, str) else p for p in prompts]

    def _adapter(self, model: str) -> str | None:
        """The adapter that a request for `model` asks for: they are models of their own names."""
        if model == self._model_name:
            return None
        names = self._engine.adapters.names
        if model in names:
            return model
        raise unknown_model(model, [self._model_name, *names])

    def _model(self, name: str) -> dict[str, Any]:
        model = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "elinvar",
            "max_context": self._engine.max_context,
        }
        return model if name == self._model_name else model | {"parent": self._model_name}


async def _run(num_chars: int, tokenise: Callable[[Given], Ids], given: Given) -> Ids:
    if num_chars <= _INLINE_CHARS:
        return tokenise(given)
    return await asyncio.to_thread(tokenise, given)


def _json(value: object) -> Response:
    return Response(encode(value), media_type="application/json")
