"""The endpoints of embedding models and rerankers: /v1/embeddings as OpenAI has it, /rerank as Jina and
Cohere do, /score as vLLM does. Which of them a model serves is its own to say.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from elinvar.engine.embed import ranked
from elinvar.server.answer import cancelled_when_client_leaves
from elinvar.server.body import read_body
from elinvar.server.errors import invalid_value, not_supported, overloaded, unknown_model
from elinvar.server.reply import reply
from elinvar.server.schema import decode
from elinvar.server.seen import note_texts
from elinvar.server.tenants import allowed_models

if TYPE_CHECKING:
    from elinvar.engine.encodings import Input
    from elinvar.engine.text_aio import AsyncTextModel
    from elinvar.engine.text_model import Task
    from elinvar.ops.api import F32

MAX_INPUTS = 2048
"""OpenAI's own limit of texts a request; of documents, too."""
_RERANK = "/v1/rerank", "/v2/rerank", "/rerank"


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    truncate: bool | None = None
    """Not OpenAI's: false makes an error of a text that is too long."""
    prompt_name: str | None = None
    """Nor this: a prompt of the model's, put before each text."""


class Document(msgspec.Struct):
    text: str


class RerankRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None
    instruction: str | None = None
    truncate: bool | None = None
    # Cohere's that are not served.
    rank_fields: list[str] | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None
    priority: int | None = None


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    user: str | None = None
    instruction: str | None = None
    truncate: bool | None = None


class TextRoutes:
    def __init__(
        self,
        engine: AsyncTextModel,
        model_name: str,
        shorten: bool,
        max_waiting: int,
        max_body_bytes: int,
        aliases: Sequence[str] = (),
    ) -> None:
        """`shorten`: whether clients may ask for fewer dimensions. aliases: other names of it."""
        self._names = {model_name, *aliases}
        self._shorten = shorten
        self.engine, self.model, self.name = engine, engine.model, model_name
        self._max_waiting, self._max_body_bytes = max_waiting, max_body_bytes
        self.created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.get_model, methods=["GET"]),
            *self.routes_beside(),
        ]

    def routes_beside(self) -> list[Route]:
        """Those that models which generate text have not."""
        return [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            *(Route(path, self.rerank, methods=["POST"]) for path in _RERANK),
            *(Route(path, self.score, methods=["POST"]) for path in ("/v1/score", "/score")),
        ]

    async def list_models(self, request: Request) -> Response:
        data = [self.described] if self.has(request.scope, self.name) else []
        return reply({"object": "list", "data": data})

    async def get_model(self, request: Request) -> Response:
        self._check_model(request, request.path_params["model"])
        return reply(self.described)

    async def embeddings(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, EmbeddingRequest)
        task, vectors = await self.embed(
            request,
            parsed.model,
            _inputs(parsed.input),
            prompt_name=parsed.prompt_name,
            dimensions=parsed.dimensions,
            truncate=parsed.truncate is not False,
        )
        as_bytes = parsed.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": _base64(vector) if as_bytes else vector.tolist(),
            }
            for i, vector in enumerate(vectors)
        ]
        return reply({"object": "list", "data": data, "model": self.name, "usage": _usage(task)})

    async def rerank(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, RerankRequest)
        self._check_model(request, parsed.model)
        for name in ("rank_fields", "max_chunks_per_doc", "max_tokens_per_doc", "priority"):
            if getattr(parsed, name):
                raise not_supported(name)
        if parsed.top_n is not None and parsed.top_n < 1:
            raise invalid_value("top_n", f"top_n must be at least 1, got {parsed.top_n}.")
        documents = [d if isinstance(d, str) else d.text for d in parsed.documents]
        self._admit(len(documents), "documents")
        task, scores = await self._run(
            request,
            lambda: self.model.ranking(
                parsed.query, documents, parsed.instruction, parsed.truncate is not False
            ),
        )
        results: list[dict[str, Any]] = [
            {"index": one.index, "relevance_score": one.score}
            for one in ranked(task, scores, parsed.top_n)
        ]
        shown = parsed.return_documents
        # Of Cohere's second version documents are never a part.
        if request.url.path != "/v2/rerank" if shown is None else shown:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        answer = {"id": f"rerank-{uuid.uuid4().hex}", "model": self.name, "results": results}
        return reply(answer | {"usage": _usage(task)})

    async def embed(
        self,
        request: Request,
        model: str,
        texts: Sequence[Input],
        *,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> tuple[Task, F32]:
        """Vectors [R, D] of the texts, for any API that calls these `input`, `dimensions` so, too.
        Raises ApiError, InputError or ModelError."""
        self._check_model(request, model)
        if dimensions is not None and not self._shorten:
            raise not_supported("dimensions", "Shortening the vectors of this model")
        self._admit(len(texts), "input")
        return await self._run(
            request,
            lambda: self.model.embedding(
                texts, prompt_name=prompt_name, dimensions=dimensions, truncate=truncate
            ),
        )

    async def score(self, request: Request) -> Response:
        """Of pairs: one text with each of several, or two lists side by side."""
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, ScoreRequest)
        self._check_model(request, parsed.model)
        firsts, seconds = (
            [one] if isinstance(one, str) else one for one in (parsed.text_1, parsed.text_2)
        )
        self._admit(len(seconds), "text_2")
        if len(firsts) not in (1, len(seconds)):
            message = f"text_1 must hold one text or as many as text_2, got {len(firsts)}."
            raise invalid_value("text_1", message)
        groups = [(first, [second]) for first, second in zip(firsts, seconds, strict=False)]
        if len(firsts) == 1:
            groups = [(firsts[0], seconds)]
        rest = parsed.instruction, parsed.truncate is not False

        def make() -> list[Task]:
            return [self.model.ranking(first, others, *rest) for first, others in groups]

        async with cancelled_when_client_leaves(request.receive):
            tasks = await asyncio.to_thread(make)
            note_texts(self.name, sum(task.num_tokens for task in tasks))
            found = await asyncio.gather(*(self.engine.run(task) for task in tasks))
        scores = [score for some in found for score in some.tolist()]
        data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]
        answer = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        usages = [_usage(task) for task in tasks]
        usage = {name: sum(one[name] for one in usages) for name in usages[0]}
        return reply(answer | {"model": self.name, "data": data, "usage": usage})

    async def _run(self, request: Request, make: Callable[[], Task]) -> tuple[Task, F32]:
        """The task, made in a thread, and its answer; a client that goes away ends it."""
        async with cancelled_when_client_leaves(request.receive):
            task = await asyncio.to_thread(make)
            note_texts(self.name, task.num_tokens)
            return task, await self.engine.run(task)

    def _admit(self, count: int, field: str) -> None:
        if not 1 <= count <= MAX_INPUTS:
            raise invalid_value(
                field, f"{field} must hold from 1 to {MAX_INPUTS} texts, got {count}."
            )
        live = self.engine.num_live
        if live and live + count > self._max_waiting:
            raise overloaded(live, "texts")

    def has(self, scope: Scope, name: str) -> bool:
        """Whether this is its name, and whoever sent the request of `scope` may ask for it."""
        allowed = allowed_models(scope)
        return name in self._names and (allowed is None or name in allowed)

    def _check_model(self, request: Request, name: str) -> None:
        if not self.has(request.scope, name):
            there = [one for one in self._names if self.has(request.scope, one)]
            raise unknown_model(name, sorted(there))

    @property
    def described(self) -> dict[str, Any]:
        """As /v1/models shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "elinvar",
            "max_context": self.model.max_tokens,
        }


def _inputs(given: str | list[Any]) -> Sequence[Input]:
    """One text or several, each a text or token ids; one list of ids is one text."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise invalid_value("input", "input must hold texts or token ids, not both.")
    return [given] if kinds == {int} else given


def _usage(task: Task) -> dict[str, int]:
    """Besides OpenAI's counts that of the texts that were cut."""
    count = task.num_tokens
    return {"prompt_tokens": count, "total_tokens": count, "num_truncated": task.num_truncated}


def _base64(vector: F32) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
