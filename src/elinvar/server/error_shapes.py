"""How each API writes an error. Which of them a request came by is known from its path or headers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.types import Scope

from elinvar.server.errors import ApiError
from elinvar.server.reply import encode

Write = Callable[[ApiError, str], bytes]

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError, scope: Scope) -> bytes:
    """The JSON object in the words of the API that was asked."""
    return _writer(scope)(error, scope.get("elinvar.request_id", ""))


def anthropic_error(error: ApiError, request_id: str) -> dict[str, Any]:
    other = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, other)
    body = {"type": kind, "message": error.message}
    return {"type": "error", "error": body, "request_id": request_id}


def is_anthropic(scope: Scope) -> bool:
    """Whether the client speaks Anthropic's API, also where others have the same path."""
    named = any(name == b"anthropic-version" for name, _ in scope["headers"])
    return named or _under(scope, "/v1/messages")


def _writer(scope: Scope) -> Write:
    if is_anthropic(scope):
        return lambda error, request_id: encode(anthropic_error(error, request_id))
    if _under(scope, "/api"):
        return lambda error, _: encode({"error": error.message})
    return lambda error, _: error.body()


def _under(scope: Scope, prefix: str) -> bool:
    path: str = scope["path"]
    return path == prefix or path.startswith(prefix + "/")
