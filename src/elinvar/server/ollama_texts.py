"""The endpoints of Ollama's API for an embedding model: /api/embed and the older /api/embeddings."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from elinvar.server.body import read_body
from elinvar.server.errors import not_supported
from elinvar.server.ollama_models import OllamaModelRoutes, Shown, plain_name
from elinvar.server.ollama_schema import (
    UNSERVED_OPTIONS,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaOptions,
)
from elinvar.server.reply import reply
from elinvar.server.schema import decode, refuse_unserved
from elinvar.server.texts import TextRoutes


class OllamaTextRoutes:
    """On top of OpenAI's."""

    def __init__(self, texts: TextRoutes, max_body_bytes: int) -> None:
        self._texts, self._max_body_bytes = texts, max_body_bytes

    def routes(self) -> list[Route]:
        models = OllamaModelRoutes(self.shown, self._max_body_bytes)
        return [*models.routes(), *self.routes_beside()]

    def routes_beside(self) -> list[Route]:
        """Those that models which generate text have not."""
        return [
            Route("/api/embed", self.embed, methods=["POST"]),
            Route("/api/embeddings", self.embed_one, methods=["POST"]),
        ]

    async def embed(self, request: Request) -> Response:
        began = time.perf_counter_ns()
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, OllamaEmbedRequest)
        _check(parsed.options)
        texts = [parsed.input] if isinstance(parsed.input, str) else parsed.input
        task, vectors = await self._texts.embed(
            request,
            plain_name(parsed.model),
            texts,
            dimensions=parsed.dimensions,
            truncate=parsed.truncate is not False,
        )
        return reply(
            {
                "model": parsed.model,
                "embeddings": vectors.tolist(),
                "total_duration": time.perf_counter_ns() - began,
                "load_duration": 0,
                "prompt_eval_count": task.num_tokens,
            }
        )

    async def embed_one(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, OllamaEmbeddingsRequest)
        _check(parsed.options)
        _, vectors = await self._texts.embed(request, plain_name(parsed.model), [parsed.prompt])
        return reply({"embedding": vectors[0].tolist()})

    def shown(self, scope: Scope) -> list[Shown]:
        texts, model = self._texts, self._texts.model
        if not texts.has(scope, texts.name):
            return []
        can = ["rerank"] if model.reranks else ["embedding"]
        name, created = texts.name, texts.created
        return [Shown(name, model.config, name, created, model.max_tokens, can)]


def _check(options: OllamaOptions | None) -> None:
    """None of them means anything to an embedding."""
    given: Any = options or OllamaOptions()
    refuse_unserved(given, UNSERVED_OPTIONS, "options.")
    for name in given.__struct_fields__:
        if name not in UNSERVED_OPTIONS and getattr(given, name) is not None:
            raise not_supported(f"options.{name}")
