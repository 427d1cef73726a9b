"""The OpenAPI document says what there is, and calls made up from it fail nobody."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from elinvar.engine.aio import AsyncEngine
from elinvar.server.app import create_app
from elinvar.server.openapi import operations
from elinvar.server.operations import OPERATIONS
from fuzz_server import chat_engine, fuzz, tiny_server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with tiny_server() as found:
        yield found


def test_document(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    assert schemas["MessagesRequest"]["required"] == ["model", "messages", "max_tokens"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    body = document["paths"]["/v1/messages"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/MessagesRequest"
    (parameter,) = document["paths"]["/v1/sessions/{id}"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("id", "path")


def test_made_up_calls(url: str) -> None:
    statuses = fuzz(url, 300)
    assert statuses.total() > 200
    assert statuses[200] > 30
    assert max(statuses) < 500


def test_nothing_is_left_out() -> None:
    """Every endpoint is in the document, but for the console's."""
    app = create_app(AsyncEngine(chat_engine()), "m", allow_adapter_loading=True)
    left_out = {path for _, path in set(operations(app.routes)) - OPERATIONS.keys()}
    assert left_out == {"/", "/console/{name}"}
