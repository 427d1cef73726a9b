"""Answers in a format, asked for over HTTP: by OpenAI's fields and vLLM's, by the official client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from elinvar.base.grammar import Choice, Grammar, JsonSchema, Lark, Literal, Regex
from elinvar.server.errors import ApiError
from elinvar.server.formats import ANY_OBJECT, asked_grammar
from elinvar.server.schema import ChatRequest, decode
from serving import Serving, serving

HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def asked(**fields: Any) -> tuple[Grammar | None, str]:
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    return asked_grammar(decode(body, ChatRequest))


def strict(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "grammar", "field"),
    [
        ({}, None, "grammar"),
        ({"response_format": None, "guided_json": None}, None, "grammar"),
        ({"response_format": {"type": "text"}}, None, "grammar"),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT, "response_format"),
        (
            {"response_format": strict({"type": "null"}, strict=True, description="a null")},
            JsonSchema('{"type": "null"}'),
            "response_format.json_schema.schema",
        ),
        ({"guided_json": {"b": 1, "a": "é"}}, JsonSchema('{"b": 1, "a": "é"}'), "guided_json"),
        ({"guided_json": '{"type":"null"}'}, JsonSchema('{"type":"null"}'), "guided_json"),
        ({"guided_regex": "a+"}, Regex("a+"), "guided_regex"),
        ({"guided_choice": ["a", "b"]}, Choice((Literal("a"), Literal("b"))), "guided_choice"),
        ({"guided_grammar": 'start: "a"'}, Lark('start: "a"'), "guided_grammar"),
        ({"structured_outputs": {"regex": "a"}}, Regex("a"), "structured_outputs.regex"),
        (
            {"structured_outputs": {"json_object": True}},
            ANY_OBJECT,
            "structured_outputs.json_object",
        ),
        (
            {"structured_outputs": {"json": True}, "response_format": {"type": "text"}},
            JsonSchema("true"),
            "structured_outputs.json",
        ),
    ],
)
def test_fields_are_grammars(fields: dict[str, Any], grammar: Grammar | None, field: str) -> None:
    assert asked(**fields) == (grammar, field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": strict({}) | {"type": "text"}}, "response_format.json_schema"),
        ({"response_format": strict([])}, "response_format.json_schema.schema"),
        ({"response_format": strict({}, extra=1)}, "response_format.json_schema.extra"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as info:
        asked(**fields)
    assert (info.value.status, info.value.param) == (400, param)


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    """Random weights: what it says keeps to a format only where it must."""
    with serving(tiny_gguf, "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def smollm(smollm2_gguf: Path) -> Iterator[Serving]:
    with serving(smollm2_gguf, "smollm") as server:
        yield server


def chat(server: Serving, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "seed": 1, **fields}
    return server.client().chat.completions.create(**body)


FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "choice": ({"guided_choice": ["yes", "no", "<|im_end|>"]}, r"yes|no|"),
    "regex": ({"guided_regex": r"\d{2,4}-[a-z]{3}"}, r"\d{2,4}-[a-z]{3}"),
    "lark": ({"guided_grammar": 'start: "[" /[0-9]{1,3}/ "]"'}, r"\[\d{1,3}\]"),
    "gbnf": ({"guided_grammar": 'root ::= "(" [ab] ")"'}, r"\([ab]\)"),
    "new name": ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_random_model_answers_in_it(tiny: Serving, name: str) -> None:
    fields, expression = FORMATS[name]
    answer = chat(tiny, n=3, temperature=1.5, extra_body=fields)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(expression, choice.message.content)


def test_completions_too(tiny: Serving) -> None:
    answer = tiny.client().completions.create(
        model="tiny",
        prompt=["a", "b"],
        max_tokens=400,
        temperature=1.2,
        extra_body={"response_format": strict(SCHEMA)},
    )
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)


def test_streams_and_log_probs_are_those_of_the_whole(tiny: Serving) -> None:
    fields: dict[str, Any] = {"response_format": strict(SCHEMA), "logprobs": True, "temperature": 1}
    whole = chat(tiny, **fields).choices[0]
    text, tokens = "", []
    for chunk in chat(tiny, stream=True, **fields):
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs:
            tokens += chunk.choices[0].logprobs.content
    assert text == whole.message.content
    assert tokens == whole.logprobs.content
    jsonschema.validate(json.loads(text), SCHEMA)


class Colour(Enum):
    red = "red"
    blue = "blue"


class Pet(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=30)


class Person(BaseModel):
    name: str = Field(max_length=20)
    likes: list[Colour] = Field(max_length=2)
    pet: Pet | None
    height: float | None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_client_parses_models(smollm: Serving, temperature: float) -> None:
    answer = smollm.client().chat.completions.parse(
        model="smollm",
        messages=[{"role": "user", "content": "Ann is 1.6 m tall, likes red, and has a dog, Rex."}],
        response_format=Person,
        temperature=temperature,
        max_tokens=400,
        seed=5,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_json_objects(smollm: Serving) -> None:
    """Cut by max_tokens where the model does not come to an end."""
    answer = chat(
        smollm,
        model="smollm",
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=80,
    ).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"response_format": strict({"type": "array", "uniqueItems": True})},
         "response_format.json_schema.schema", "uniqueItems"),
        ({"guided_json": {"type": "string", "format": "iban"}}, "guided_json", "iban"),
        ({"guided_regex": "(?=a)"}, "guided_regex", "look-around"),
        ({"guided_grammar": "start: ("}, "guided_grammar", "not supported"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        ({"guided_json": {"type": "integer", "multipleOf": 10**9 + 7}}, "guided_json", "multipleOf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_is_not_supported_is_named(
    tiny: Serving, path: str, fields: dict[str, Any], param: str, reason: str
) -> None:
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    answer = tiny.post(path, {"model": "tiny", **prompt, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert reason in error["message"] and error["message"].startswith(param)
    assert tiny.idle()


def test_others_are_answered_while_large_grammars_are_compiled(tiny: Serving) -> None:
    """They wait for one another, not the others for them."""
    large = {"enum": [f"a rather long value number {i} of {i * i}" for i in range(2500)]}

    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60) as client:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 5}
            heavy = [
                client.post(
                    "/v1/chat/completions", json=body | {"guided_json": large | {"title": i}}
                )
                for i in map(str, range(3))
            ]
            light = [client.post("/v1/chat/completions", json=body) for _ in range(5)]
            return [answer.status_code for answer in await asyncio.gather(*heavy, *light)]

    assert asyncio.run(run()) == [200] * 8


def test_the_client_cannot_parse_a_cut_answer(tiny: Serving) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        tiny.client().chat.completions.parse(
            model="tiny", messages=HELLO, response_format=Person, max_tokens=2
        )


def test_responses_too(smollm: Serving) -> None:
    answer = smollm.client().responses.parse(
        model="smollm", input="Ann likes blue.", text_format=Person, temperature=0
    )
    assert isinstance(answer.output_parsed, Person)
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as info:
        smollm.client().responses.create(
            model="smollm",
            input="x",
            text={"format": {"type": "json_schema", "name": "n", "schema": {"uniqueItems": True}}},
        )
    assert info.value.param == "text.format.schema"
    with pytest.raises(openai.BadRequestError) as info:
        smollm.client().responses.create(
            model="smollm", input="x", extra_body={"text": {"format": {"type": "xml"}}}
        )
    assert info.value.param == "text.format.type"
