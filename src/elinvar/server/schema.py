"""The request bodies the server reads, and the one way they are decoded.

Types are checked by msgspec while it parses; every complaint names the field by its path
(`messages[1].content`). A JSON null counts as "not given". What a value means, and whether this
server can serve it, is decided in prepare.py.

Unknown fields are refused, as OpenAI does: a misspelt parameter that is silently ignored gives
wrong answers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

import msgspec

from elinvar.server.errors import ApiError, bad_request, not_supported


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(msgspec.Struct):
    """One part of a message. Only text is served; the others keep their type for the refusal."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    function: CalledFunction
    type: str = "function"
    # What clients that join a stream's chunks leave in.
    index: int | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    # What a client sends back of an earlier answer.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    # Extensions: what the assistant thought, under either of its names.
    reasoning_content: str | None = None
    reasoning: str | None = None


class Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """Other types keep theirs for the refusal."""

    type: str
    function: Function | None = None


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    function: FunctionName
    type: Literal["function"] = "function"


class NamedChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """tool_choice: this one."""

    function: FunctionName


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(
    msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """tool_choice: any of these."""

    allowed_tools: AllowedTools


class SchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    # Answers keep to the schema whether it is strict or not.
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """One of them, as vLLM takes them."""

    json: dict[str, Any] | bool | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both endpoints."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Extensions.
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    session_id: str | None = None
    expect_return_s: float | None = None
    pause_kind: str | None = None
    service_tier: str | None = None
    # Lossy (SamplingParams.attention_window): attend to the first and the last tokens alone.
    attention_window: int | None = None
    attention_sinks: int | None = None
    # Lossy: the answer attends to so many tokens of the prompt alone.
    attention_budget: int | None = None


class ChatRequest(Common, kw_only=True):
    messages: list[Message]
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    # An extension: of all thoughts of an answer.
    max_thinking_tokens: int | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # An extension: what else the model's chat template reads.
    chat_template_kwargs: dict[str, Any] | None = None
    # Accepted; they change nothing here.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Not served yet.
    audio: Any = None
    function_call: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: Any = None


class CompletionRequest(Common, kw_only=True):
    prompt: str | list[str | int | list[int]]
    # An extension: OpenAI's has none.
    response_format: ResponseFormat | None = None
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    # Accepted; it changes nothing here.
    metadata: dict[str, str] | None = None


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """As vLLM's endpoints of this name take them, and the next."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str


class SessionRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Of a session that there is, all but the id and the model."""

    id: str | None = None
    model: str | None = None
    expect_return_s: float | None = None
    ttl_s: float | None = None
    pause_kind: str | None = None


class ForkRequest(msgspec.Struct, forbid_unknown_fields=True):
    id: str | None = None
    n: int | None = None


DEFAULTS: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that are not served yet, with the values that ask for nothing."""


def refuse_unserved(
    request: msgspec.Struct, harmless: Mapping[str, tuple[object, ...]], prefix: str = ""
) -> None:
    """Raises ApiError for fields that are known, but not served. harmless: those, with the values
    that ask for nothing."""
    for name, values in harmless.items():
        value = getattr(request, name, None)
        if value is not None and value not in values:
            raise not_supported(prefix + name)


Request = TypeVar("Request", bound=msgspec.Struct)

_decoder = cache(msgspec.json.Decoder)


def decode(body: bytes, kind: type[Request]) -> Request:
    """A request body, or ApiError 400 naming what is wrong with it."""
    try:
        decoded: Request = _decoder(kind).decode(body)
        return decoded
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), kind) from None
    except msgspec.DecodeError as error:
        raise _syntax_error(body, str(error)) from None
    except UnicodeDecodeError:
        raise bad_request("The request body is not valid UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise bad_request("The request body is nested too deeply.", code="invalid_json") from None


_MAX_SEARCHED = 2**20
"""Bytes of a malformed body that are searched for a NaN; a longer one would hold up the others."""

_AT = re.compile(r"^(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?$", re.DOTALL)
_EXPECTED = re.compile(r"Expected `(.*)`, got `(.*)`")
_FIELD = re.compile(r"field `(.*)`", re.DOTALL)
_NAMES = {"str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean"}
_NAMES |= {"array": "an array", "object": "an object"}


def convert(value: object, kind: type[Request], path: str) -> Request:
    """A decoded value at `path` as a structure, or ApiError 400 naming what is wrong with it."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), kind, path) from None


def _validation_error(text: str, kind: type[msgspec.Struct], at: str = "") -> ApiError:
    """msgspec's sentence about a wrong value, in the API's words. at: the path of the whole."""
    match = _AT.match(text)
    assert match is not None  # every part of the pattern is optional
    what, path = match[1], ".".join(part for part in (at, match[2]) if part)
    if expected := _EXPECTED.match(what):
        wanted, got = (_type_names(group) for group in expected.groups())
        if not path:
            return bad_request(
                f"The request body must be {wanted}, got {got}.", code="invalid_type"
            )
        message = f"Invalid type for '{path}': expected {wanted}, got {got}."
        return bad_request(message, path, "invalid_type")
    if field := _FIELD.search(what):
        name = f"{path}.{field[1]}" if path else field[1]
        name = name[:200]
        if "missing" in what:
            message = f"Missing required parameter: '{name}'."
            return bad_request(message, name, "missing_required_parameter")
        near = [] if path else difflib.get_close_matches(name, kind.__struct_fields__, n=1)
        hint = f". Did you mean {near[0]}?" if near else ""
        message = f"Unrecognized request argument supplied: {name}{hint}"
        return bad_request(message, name, "unknown_parameter")
    return bad_request(f"Invalid value for '{path}': {what[:200]}.", path or None, "invalid_value")


def _type_names(types: str) -> str:
    return " or ".join(_NAMES.get(name, name) for name in types.split(" | "))


def _syntax_error(body: bytes, text: str) -> ApiError:
    """Malformed JSON. NaN and Infinity are not JSON, but clients write them: name the field."""
    if "surrogate" in text:
        text += "; a string holds half of a surrogate pair, which is not a character"
    elif len(body) <= _MAX_SEARCHED and (path := _non_finite(body)) is not None:
        message = f"Invalid value for '{path}': expected a finite number."
        return bad_request(message, path, "invalid_value")
    return bad_request(f"The request body is not valid JSON: {text}.", code="invalid_json")


def _non_finite(body: bytes) -> str | None:
    """Path of the first NaN or Infinity in a body that is JSON otherwise; None without one."""
    marker = object()
    try:
        stack = [("", json.loads(body, parse_constant=lambda _: marker))]
    except (ValueError, RecursionError):
        return None
    while stack:
        path, value = stack.pop()
        if value is marker:
            return path
        if isinstance(value, dict):
            inner = [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
            stack += reversed(inner)
        elif isinstance(value, list):
            stack += [(f"{path}[{i}]", item) for i, item in reversed(list(enumerate(value)))]
    return None
