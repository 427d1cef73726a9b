"""Lists in pages, as OpenAI's API cuts them: `limit`, `after` (an id) and `order`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from elinvar.server.errors import ApiError, invalid_value

DEFAULT_LIMIT, MAX_LIMIT = 20, 100


@dataclass(frozen=True, slots=True)
class Page:
    """What a client asked for."""

    limit: int
    after: str | None
    order: str
    """asc or desc."""

    @classmethod
    def of(cls, request: Request, default: int = DEFAULT_LIMIT, most: int = MAX_LIMIT) -> Page:
        """Raises ApiError naming the field."""
        query = request.query_params
        text, order = query.get("limit", str(default)), query.get("order", "desc")
        limit = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if not 1 <= limit <= most:
            raise invalid_value("limit", f"limit must be from 1 to {most}, got {text[:100]!r}.")
        if order not in ("asc", "desc"):
            raise invalid_value("order", f"order must be asc or desc, got {order[:100]!r}.")
        return cls(limit, query.get("after"), order)

    def cut(self, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The page of `found`, which is in this order. Raises ApiError where `after` is not in it."""
        first = 0
        if self.after is not None:
            ids = [one["id"] for one in found]
            if self.after not in ids:
                message = f"after must be an id of the list, got {self.after[:200]!r}."
                raise ApiError(404, message, "after", "not_found")
            first = ids.index(self.after) + 1
        data = found[first : first + self.limit]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": first + len(data) < len(found),
        }
