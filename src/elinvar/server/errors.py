"""Errors as the OpenAI API spells them: one JSON shape for everything that goes wrong.

Owns the mapping from exceptions to (HTTP status, body). Nothing here knows the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException

from elinvar.base.errors import EngineError, InputError, ModelError, QueueFullError


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. `param` is the path of the field as the client wrote it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    type: str = "invalid_request_error"
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON object `{"error": {message, type, param, code}}`."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


class ClientGoneError(Exception):
    """The client closed the connection; nobody is there to be told anything."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def invalid_value(param: str, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_value")


def not_supported(param: str, what: str | None = None, remedy: str | None = None) -> ApiError:
    """A parameter that the API has and this server does not serve."""
    return ApiError(
        400,
        f"{what or param} is not supported; {remedy or f'leave {param} out'}.",
        param,
        "unsupported_parameter",
    )


def too_long(max_context: int, num_prompt: int, max_tokens: int | None, param: str) -> ApiError:
    """`max_tokens` None: the prompt alone leaves no room for one token."""
    wants = (
        f"your {param} has {num_prompt} tokens, which leaves no room for an answer"
        if max_tokens is None
        else f"you requested {num_prompt + max_tokens} tokens ({num_prompt} in the {param}, "
        f"{max_tokens} in the completion)"
    )
    return ApiError(
        400,
        f"This model's maximum context length is {max_context} tokens. However, {wants}. "
        f"Please reduce the length of the {param} or of the completion.",
        param,
        "context_length_exceeded",
    )


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    there = ", ".join(f"'{one}'" for one in served) or "none for you"
    return ApiError(
        404,
        f"The model '{name[:200]}' does not exist; this server has {there}.",
        "model",
        "model_not_found",
    )


def overloaded(count: int, what: str, retry_after_s: float = 1.0) -> ApiError:
    message = f"The server is overloaded: {count} {what} are running or waiting; try again later."
    return too_many(message, retry_after_s)


def too_many(message: str, retry_after_s: float) -> ApiError:
    """retry_after_s: when it is worth while to ask again."""
    headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
    return ApiError(429, message, None, "rate_limit_exceeded", "rate_limit_error", headers)


CANCELLED = "cancelled"
"""Why the engine ended a request: somebody asked for that."""


def cancelled() -> ApiError:
    # 499 is what gRPC's CANCELLED is in HTTP. Clients try again after 409, 429 and from 500 on, and
    # this one shall not.
    message = "The request was cancelled before it was finished."
    return ApiError(499, message, None, "request_cancelled", "request_cancelled")


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, None, "service_unavailable", "server_error")


FULL_STATUS = 507
"""Insufficient storage (RFC 4918)."""


@contextmanager
def own_names(names: Mapping[str, str]) -> Iterator[None]:
    """What the engine refuses is named as an API calls it. names: API's by the engine's; others
    stay."""
    try:
        yield
    except InputError as error:
        own = names.get(error.field, error.field)
        raise invalid_value(own, str(error).replace(error.field, own, 1)) from None


def no_room(message: str) -> ApiError:
    """The server's disk is full."""
    return ApiError(FULL_STATUS, message, None, "insufficient_storage", "server_error")


def not_found(what: str, name: str, param: str = "id") -> ApiError:
    return ApiError(404, f"There is no {what} {name[:200]!r}.", param, "not_found")


def as_api_error(error: Exception) -> ApiError | None:
    """What the client is told; None for a bug, which the caller logs and answers with a 500."""
    match error:
        case ApiError():
            return error
        case InputError():
            return invalid_value(error.field, str(error))
        case QueueFullError():
            return too_many(str(error), error.retry_after_s)
        case EngineError():
            return unavailable(str(error))
        case ModelError():
            return bad_request(str(error), "model")
        case RecursionError():
            # Shallow enough to be decoded, and too deep for what is done with it: templates, schemas.
            return bad_request("The request body is nested too deeply.", code="invalid_json")
        case HTTPException(status_code=404):
            return ApiError(404, f"Unknown URL: {error.detail}.", None, "unknown_url")
        case HTTPException(status_code=405):
            headers = dict(error.headers or {})
            message = f"Method not allowed; this URL takes {headers.get('Allow', 'others')}."
            return ApiError(405, message, None, "method_not_allowed", headers=headers)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
    return None


INTERNAL = ApiError(
    500,
    "The server had an error while processing your request; its log says more.",
    None,
    "internal_error",
    "server_error",
)
