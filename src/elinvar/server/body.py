"""Reading a request's body, with a limit on its size and on the time it may take."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import Receive, Scope

from elinvar.server.errors import ApiError, ClientGoneError

READ_SECONDS = 60.0
"""A client that has not sent its body by then is told so."""
_DRAIN_SECONDS = 5.0


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises ApiError 413 or 408."""
    headers = dict(scope["headers"])
    if int(headers.get(b"content-length", b"0")) > limit:
        # With `expect` the client waits to be told, otherwise it is already writing.
        if b"expect" not in headers:
            await drain(receive)
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    more = True
    try:
        async with asyncio.timeout(READ_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                more = message.get("more_body", False)
                if size > limit:
                    break
    except TimeoutError:
        text = f"The request body did not arrive within {READ_SECONDS:g} s."
        raise ApiError(408, text, code="timeout", headers={"Connection": "close"}) from None
    if size > limit:
        if more:
            await drain(receive)
        raise _too_large(limit)
    return b"".join(parts)


async def drain(receive: Receive) -> None:
    """Read on for a moment: a client that is still writing when the connection closes would see
    a reset instead of the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than this server's limit of {limit} bytes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )
