"""Models as Anthropic's API shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def model_list(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All on one page."""
    data = [model_info(one) for one in described]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": False, "first_id": ends[0], "last_id": ends[1]}


def model_info(described: Mapping[str, Any]) -> dict[str, Any]:
    """`described`: as Models.describe has it."""
    return {
        "type": "model",
        "id": described["id"],
        "display_name": described["id"],
        "created_at": datetime.fromtimestamp(described["created"], UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": described.get("max_context"),
        "max_tokens": described.get("max_context"),
    }
