"""The OpenAPI document of the endpoints that a server has, at /openapi.json.

Written from the structs that bodies are decoded into, so that it cannot say anything else than what is
checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from elinvar.server.anthropic_schema import CountTokensRequest, MessagesRequest
from elinvar.server.ollama_schema import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from elinvar.server.reply import reply
from elinvar.server.schema import (
    ChatRequest,
    CompletionRequest,
    ForkRequest,
    LoadAdapterRequest,
    SessionRequest,
    UnloadAdapterRequest,
)
from elinvar.server.texts import EmbeddingRequest, RerankRequest

JSON = dict[str, Any]
_JSON, _EVENTS, _LINES = "application/json", "text/event-stream", "application/x-ndjson"
_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. Whatever goes wrong has the shape of its API."""

    summary: str
    body: type[msgspec.Struct] | None = None
    answers: tuple[str, ...] = (_JSON,)
    """Media types."""
    query: tuple[str, ...] = ()
    body_required: bool = True


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/models"): Operation("The models that answer"),
    ("GET", "/v1/models/{model}"): Operation("One model"),
    ("POST", "/v1/chat/completions"): Operation(
        "The next message of a conversation", ChatRequest, (_JSON, _EVENTS)
    ),
    ("POST", "/v1/completions"): Operation(
        "How a text goes on", CompletionRequest, (_JSON, _EVENTS)
    ),
    ("POST", "/v1/embeddings"): Operation("Vectors of texts", EmbeddingRequest),
    ("POST", "/v1/rerank"): Operation("How well documents answer a query", RerankRequest),
    ("POST", "/v1/messages"): Operation(
        "Anthropic's: the next message of a conversation", MessagesRequest, (_JSON, _EVENTS)
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Anthropic's: the tokens of a conversation", CountTokensRequest
    ),
    ("POST", "/api/chat"): Operation(
        "Ollama's: the next message of a conversation", OllamaChatRequest, (_JSON, _LINES)
    ),
    ("POST", "/api/generate"): Operation(
        "Ollama's: the answer to a prompt", OllamaGenerateRequest, (_JSON, _LINES)
    ),
    ("POST", "/api/embed"): Operation("Ollama's: vectors of texts", OllamaEmbedRequest),
    ("POST", "/api/embeddings"): Operation(
        "Ollama's: the vector of a text", OllamaEmbeddingsRequest
    ),
    ("POST", "/api/show"): Operation("Ollama's: one model", OllamaShowRequest),
    ("GET", "/api/tags"): Operation("Ollama's: the models that answer"),
    ("GET", "/api/ps"): Operation("Ollama's: the models that are loaded"),
    ("GET", "/api/version"): Operation("Ollama's: the version of its API"),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "Loads an adapter", LoadAdapterRequest, ("text/plain",)
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Unloads an adapter", UnloadAdapterRequest, ("text/plain",)
    ),
    ("GET", "/v1/sessions"): Operation("The sessions", query=("limit", "after", "order")),
    ("POST", "/v1/sessions"): Operation("Makes a session", SessionRequest, body_required=False),
    ("GET", "/v1/sessions/{id}"): Operation("One session"),
    ("POST", "/v1/sessions/{id}"): Operation("Changes a session's hints", SessionRequest),
    ("DELETE", "/v1/sessions/{id}"): Operation("Forgets a session"),
    ("POST", "/v1/sessions/{id}/fork"): Operation(
        "Makes sessions that go on from one", ForkRequest, body_required=False
    ),
    ("GET", "/v1/requests/{id}/explain"): Operation("Where a request's time went"),
    ("GET", "/health"): Operation("Whether the server can answer"),
    ("GET", "/metrics"): Operation("Figures for Prometheus", answers=("text/plain",)),
    ("GET", "/openapi.json"): Operation("This document"),
}
"""By method and path."""


def route() -> Route:
    """Of the document itself; it describes the application that has it."""
    return Route("/openapi.json", _show, methods=["GET"])


async def _show(request: Request) -> Response:
    return reply(document(request.app.routes))


def document(routes: Iterable[BaseRoute]) -> JSON:
    """The OpenAPI 3.1 document of `routes`. Those that are not among the OPERATIONS are none of an
    API."""
    from elinvar import __version__

    found = {
        (method, path): OPERATIONS[method, path]
        for method, path in operations(routes)
        if (method, path) in OPERATIONS
    }
    bodies = list(dict.fromkeys(one.body for one in found.values() if one.body is not None))
    _, schemas = msgspec.json.schema_components(bodies, ref_template=_REFERENCE)
    paths: dict[str, JSON] = {}
    for (method, path), operation in found.items():
        paths.setdefault(path, {})[method.lower()] = _described(path, operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Elinvar", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # Either, or none where the server has no tenants.
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def operations(routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """(method, path) of each, as OpenAPI writes paths."""
    return [
        (method, _PARAMETER.sub(r"{\1}", one.path))
        for one in routes
        if isinstance(one, Route)
        for method in sorted(one.methods or ())
        if method != "HEAD"
    ]


def _described(path: str, operation: Operation) -> JSON:
    described: JSON = {
        "summary": operation.summary,
        "responses": {
            "200": {
                "description": "The answer",
                "content": {kind: {} for kind in operation.answers},
            },
            "default": {"description": "An error", "content": {_JSON: {}}},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(path)
    ]
    parameters += [
        {"name": name, "in": "query", "schema": {"type": "string"}} for name in operation.query
    ]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        schema = {"$ref": _REFERENCE.format(name=operation.body.__name__)}
        content = {_JSON: {"schema": schema}}
        described["requestBody"] = {"required": operation.body_required, "content": content}
    return described
