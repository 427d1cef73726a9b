"""JSON answers."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

encode = msgspec.json.encode


def reply(value: object, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")
