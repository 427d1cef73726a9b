"""Formats that answers are asked for in: from the fields that name one to a grammar.

response_format is OpenAI's; the others are vLLM's, under their old names and the new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import InputError
from elinvar.base.grammar import Choice, Grammar, JsonSchema, Lark, Literal, Regex
from elinvar.server.errors import bad_request, invalid_value

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.server.schema import ChatRequest, CompletionRequest, ResponseFormat

ANY_OBJECT = JsonSchema('{"type":"object"}')
"""What json_object means."""


def asked_grammar(request: ChatRequest | CompletionRequest) -> tuple[Grammar | None, str]:
    """The grammar of the answer, and the field that asks for it. Raises ApiError naming the field."""
    found = list(_fields(request))
    if len(found) > 1:
        names = " or ".join(field for field, _ in found)
        raise invalid_value(found[1][0], f"An answer has one format: give {names}.")
    return (found[0][1], found[0][0]) if found else (None, "grammar")


async def make_ready(engine: AsyncEngine, grammar: Grammar | None, field: str) -> None:
    """Has the grammar compiled, beside whatever else goes on. Raises InputError naming `field` where
    it cannot be."""
    if grammar is not None:
        try:
            await engine.compile(grammar)
        except InputError as error:
            raise InputError(field, f"{field}: {error}") from None


def _fields(request: ChatRequest | CompletionRequest) -> Iterator[tuple[str, Grammar]]:
    if request.response_format is not None:
        yield from _response_format(request.response_format)
    old = {
        "json": request.guided_json,
        "regex": request.guided_regex,
        "choice": request.guided_choice,
        "grammar": request.guided_grammar,
    }
    yield from _given("guided_", old)
    if (new := request.structured_outputs) is not None:
        names = "json", "json_object", "regex", "choice", "grammar"
        given = list(_given("structured_outputs.", {name: getattr(new, name) for name in names}))
        if not given:
            message = f"structured_outputs must have one of {', '.join(names)}."
            raise invalid_value("structured_outputs", message)
        yield from given


def _response_format(wanted: ResponseFormat) -> Iterator[tuple[str, Grammar]]:
    if wanted.type != "json_schema":
        if wanted.json_schema is not None:
            message = f"A response_format of type {wanted.type} has no json_schema."
            raise invalid_value("response_format.json_schema", message)
        if wanted.type == "json_object":
            yield "response_format", ANY_OBJECT
        return
    if wanted.json_schema is None:
        name = "response_format.json_schema"
        raise bad_request(
            f"Missing required parameter: '{name}'.", name, "missing_required_parameter"
        )
    yield "response_format.json_schema.schema", _schema(wanted.json_schema.schema)


def _given(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Grammar]]:
    for name, value in values.items():
        field = prefix + name
        match name, value:
            case (_, None) | ("json_object", False):
                continue
            case "json", _:
                yield field, _schema(value)
            case "json_object", _:
                yield field, ANY_OBJECT
            case "regex", _:
                yield field, Regex(value)
            case "grammar", _:
                yield field, Lark(value)
            case "choice", []:
                raise invalid_value(field, f"{field} must hold at least one text, got none.")
            case "choice", _:
                yield field, Choice(tuple(map(Literal, value)))


def _schema(schema: dict[str, Any] | bool | str | None) -> JsonSchema:
    """A text is a schema as JSON."""
    if isinstance(schema, str):
        return JsonSchema(schema)
    return JsonSchema(json.dumps({} if schema is None else schema, ensure_ascii=False))
