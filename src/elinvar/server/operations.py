"""The endpoints of all APIs, for their OpenAPI document: what each is for, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from elinvar.server.anthropic_schema import CountTokensRequest, MessagesRequest
from elinvar.server.batches import BatchRequest
from elinvar.server.ollama_schema import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from elinvar.server.responses_schema import InputTokensRequest, ResponseRequest
from elinvar.server.schema import (
    ChatRequest,
    CompletionRequest,
    ForkRequest,
    LoadAdapterRequest,
    SessionRequest,
    UnloadAdapterRequest,
)
from elinvar.server.texts import EmbeddingRequest, RerankRequest, ScoreRequest
from elinvar.server.tokenize import DetokenizeRequest, TokenizeRequest

JSON, EVENTS, LINES = "application/json", "text/event-stream", "application/x-ndjson"
PLAIN, ANY = "text/plain", "application/octet-stream"
_PAGE = "limit", "after", "order"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. Whatever goes wrong has the shape of its API."""

    summary: str
    body: type[msgspec.Struct] | None = None
    answers: tuple[str, ...] = (JSON,)
    """Media types."""
    query: tuple[str, ...] = ()
    body_required: bool = True
    form: tuple[str, ...] = ()
    """Fields of a multipart form instead of a body; `file` is one."""


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/models"): Operation("The models that answer"),
    ("GET", "/v1/models/{model}"): Operation("One model"),
    ("POST", "/v1/chat/completions"): Operation(
        "The next message of a conversation", ChatRequest, (JSON, EVENTS)
    ),
    ("POST", "/v1/completions"): Operation("How a text goes on", CompletionRequest, (JSON, EVENTS)),
    ("POST", "/v1/responses"): Operation(
        "The next items of a conversation", ResponseRequest, (JSON, EVENTS)
    ),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "The tokens of a conversation", InputTokensRequest
    ),
    ("GET", "/v1/responses/{id}"): Operation(
        "A response that was stored",
        answers=(JSON, EVENTS),
        query=("stream", "starting_after", "include", "include_obfuscation"),
    ),
    ("DELETE", "/v1/responses/{id}"): Operation("Forgets a response"),
    ("POST", "/v1/responses/{id}/cancel"): Operation("Ends a response in the background"),
    ("GET", "/v1/responses/{id}/input_items"): Operation("What a response was to", query=_PAGE),
    ("POST", "/v1/files"): Operation("Takes a file", form=("file", "purpose")),
    ("GET", "/v1/files"): Operation("The files", query=(*_PAGE, "purpose")),
    ("GET", "/v1/files/{id}"): Operation("One file"),
    ("DELETE", "/v1/files/{id}"): Operation("Deletes a file"),
    ("GET", "/v1/files/{id}/content"): Operation("What a file holds", answers=(ANY,)),
    ("POST", "/v1/batches"): Operation("Answers the lines of a file", BatchRequest),
    ("GET", "/v1/batches"): Operation("The batches", query=("limit", "after")),
    ("GET", "/v1/batches/{id}"): Operation("One batch"),
    ("POST", "/v1/batches/{id}/cancel"): Operation("Ends a batch"),
    ("POST", "/v1/embeddings"): Operation("Vectors of texts", EmbeddingRequest),
    **{
        ("POST", path): Operation("How well documents answer a query", RerankRequest)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    },
    **{
        ("POST", path): Operation("How well pairs of texts go together", ScoreRequest)
        for path in ("/v1/score", "/score")
    },
    ("POST", "/tokenize"): Operation("The tokens of a text, or of a conversation", TokenizeRequest),
    ("POST", "/detokenize"): Operation("The text of tokens", DetokenizeRequest),
    ("GET", "/version"): Operation("Elinvar's version"),
    ("POST", "/v1/messages"): Operation(
        "Anthropic's: the next message of a conversation", MessagesRequest, (JSON, EVENTS)
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Anthropic's: the tokens of a conversation", CountTokensRequest
    ),
    ("POST", "/api/chat"): Operation(
        "Ollama's: the next message of a conversation", OllamaChatRequest, (JSON, LINES)
    ),
    ("POST", "/api/generate"): Operation(
        "Ollama's: the answer to a prompt", OllamaGenerateRequest, (JSON, LINES)
    ),
    ("POST", "/api/embed"): Operation("Ollama's: vectors of texts", OllamaEmbedRequest),
    ("POST", "/api/embeddings"): Operation(
        "Ollama's: the vector of a text", OllamaEmbeddingsRequest
    ),
    ("POST", "/api/show"): Operation("Ollama's: one model", OllamaShowRequest),
    ("GET", "/api/tags"): Operation("Ollama's: the models that answer"),
    ("GET", "/api/ps"): Operation("Ollama's: the models that are loaded"),
    ("GET", "/api/version"): Operation("Ollama's: the version of its API"),
    ("POST", "/v1/load_lora_adapter"): Operation("Loads an adapter", LoadAdapterRequest, (PLAIN,)),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Unloads an adapter", UnloadAdapterRequest, (PLAIN,)
    ),
    ("GET", "/v1/sessions"): Operation("The sessions", query=_PAGE),
    ("POST", "/v1/sessions"): Operation("Makes a session", SessionRequest, body_required=False),
    ("GET", "/v1/sessions/{id}"): Operation("One session"),
    ("POST", "/v1/sessions/{id}"): Operation("Changes a session's hints", SessionRequest),
    ("DELETE", "/v1/sessions/{id}"): Operation("Forgets a session"),
    ("POST", "/v1/sessions/{id}/fork"): Operation(
        "Makes sessions that go on from one", ForkRequest, body_required=False
    ),
    ("POST", "/sleep"): Operation(
        "Gives back the memory of weights and KV cache", query=("level", "mode", "model")
    ),
    ("POST", "/wake_up"): Operation("Answers again", query=("model",)),
    ("GET", "/is_sleeping"): Operation("Whether models sleep", query=("model",)),
    ("GET", "/v1/requests/{id}/explain"): Operation("Where a request's time went"),
    ("POST", "/v1/requests/{id}/cancel"): Operation("Ends a request"),
    ("GET", "/live"): Operation(
        "What happens now", answers=(JSON, EVENTS), query=("stream", "history")
    ),
    ("GET", "/ready"): Operation("Whether the server is to be sent requests"),
    ("GET", "/health"): Operation("Whether the server can answer"),
    ("GET", "/metrics"): Operation("Figures for Prometheus", answers=(PLAIN,)),
    ("GET", "/openapi.json"): Operation("This document"),
}
"""By method and path."""
