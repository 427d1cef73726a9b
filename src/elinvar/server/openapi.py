"""The OpenAPI document of the endpoints that a server has, at /openapi.json.

Written from the structs that bodies are decoded into, so that it cannot say anything else than what is
checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from elinvar.server.operations import JSON, OPERATIONS, Operation
from elinvar.server.reply import reply

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_FORM = "multipart/form-data"
Object = dict[str, Any]


def route() -> Route:
    """Of the document itself; it describes the application that has it."""
    return Route("/openapi.json", _show, methods=["GET"])


async def _show(request: Request) -> Response:
    return reply(document(request.app.routes))


def document(routes: Iterable[BaseRoute]) -> Object:
    """The OpenAPI 3.1 document of `routes`. Those that are not among the OPERATIONS are none of an
    API."""
    from elinvar import __version__

    found = {
        (method, path): OPERATIONS[method, path]
        for method, path in operations(routes)
        if (method, path) in OPERATIONS
    }
    bodies = list(dict.fromkeys(one.body for one in found.values() if one.body is not None))
    references, schemas = msgspec.json.schema_components(bodies, ref_template=_REFERENCE)
    schema_of = dict(zip(bodies, references, strict=True))
    paths: dict[str, Object] = {}
    for (method, path), operation in found.items():
        schema = schema_of[operation.body] if operation.body else _form(operation.form)
        paths.setdefault(path, {})[method.lower()] = _described(path, operation, schema)
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


def _form(fields: Iterable[str]) -> Object:
    kinds = {name: {"type": "string"} for name in fields}
    if "file" in kinds:
        kinds["file"]["format"] = "binary"
    return {"type": "object", "properties": kinds, "required": list(kinds)}


def _described(path: str, operation: Operation, schema: Object) -> Object:
    """schema: its body's."""
    described: Object = {
        "summary": operation.summary,
        "responses": {
            "200": {
                "description": "The answer",
                "content": {kind: {} for kind in operation.answers},
            },
            "default": {"description": "An error", "content": {JSON: {}}},
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
    if operation.body or operation.form:
        content = {_FORM if operation.form else JSON: {"schema": schema}}
        described["requestBody"] = {"required": operation.body_required, "content": content}
    return described
