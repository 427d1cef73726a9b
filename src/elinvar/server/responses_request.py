"""A request of /v1/responses in the words of /v1/chat/completions, so that what it means is said once,
there. No engine and no HTTP here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from elinvar.base.errors import InputError
from elinvar.server import prepare, schema
from elinvar.server import responses_schema as kinds
from elinvar.server.errors import (
    ApiError,
    as_api_error,
    invalid_value,
    not_supported,
)
from elinvar.server.responses_items import Item, to_messages
from elinvar.server.schema import ChatRequest, convert

MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
"""OpenAI's own limits: pairs, and characters of each."""
_OTHERS = "n", "max_tokens", "stream_options"
"""Fields of `Common` that this API has not, or means otherwise."""
_OF_CHATS = "prompt_logprobs", "use_beam_search", "length_penalty"
"""Extensions that need several answers, or a place to be told."""
_WORDS = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "json_schema.": "",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    ".function.": ".",
}
"""What chat completions call the same, in messages of errors."""


def check_supported(request: kinds.ResponseRequest) -> None:
    """Raises ApiError for what is known, but not served."""
    check_harmless(request)
    if request.n not in (None, 1):
        raise not_supported("n", "More than one answer")
    if request.max_tokens is not None:
        raise not_supported("max_tokens", remedy="give max_output_tokens")
    for name in _OF_CHATS:
        if getattr(request, name) not in (None, False):
            raise not_supported(name)
    if request.max_tool_calls is not None and request.max_tool_calls < 1:
        raise invalid_value("max_tool_calls", "max_tool_calls must be at least 1.")
    if request.background and request.store is False:
        raise invalid_value("store", "What runs in the background is stored; leave store out.")
    for i, name in enumerate(request.include or ()):
        if name not in kinds.INCLUDED:
            there = f"there are {', '.join(kinds.INCLUDED)}"
            raise not_supported(f"include[{i}]", f"Including {name[:100]!r}", there)
    check_metadata(request.metadata)
    if prepare.stream_usage(request):  # type: ignore[arg-type]
        remedy = "the last event has the usage"
        raise not_supported("stream_options.include_usage", remedy=remedy)
    if request.stream_options and request.stream_options.include_obfuscation:
        raise not_supported("stream_options.include_obfuscation")


def check_harmless(request: kinds.ResponseRequest | kinds.InputTokensRequest) -> None:
    for name, harmless in kinds.NOT_SERVED.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise not_supported(name)
    wishes = request.reasoning or kinds.Reasoning()
    for name in ("summary", "generate_summary", "context"):
        value = getattr(wishes, name)
        if value not in (None, "auto"):
            raise not_supported(f"reasoning.{name}", f"reasoning.{name} {value!r}")
    if wishes.mode not in (None, "standard"):
        raise not_supported("reasoning.mode")


def check_metadata(metadata: dict[str, str] | None) -> None:
    pairs = metadata or {}
    if len(pairs) > MAX_METADATA:
        message = f"metadata may hold {MAX_METADATA} pairs, got {len(pairs)}."
        raise invalid_value("metadata", message)
    for key, value in pairs.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            message = f"metadata takes keys of {MAX_KEY} and values of {MAX_VALUE} characters."
            raise invalid_value("metadata", message)


def as_chat(request: kinds.ResponseRequest, items: Sequence[Item]) -> ChatRequest:
    """The same as a chat. items: all of the conversation. Raises ApiError naming the field."""
    shared = {n: getattr(request, n) for n in schema.Common.__struct_fields__ if n not in _OTHERS}
    wishes = request.text or kinds.TextWishes()
    tools = [_tool(one, f"tools[{i}]") for i, one in enumerate(request.tools or ())]
    return ChatRequest(
        **shared,
        messages=to_messages(items, request.instructions),
        max_completion_tokens=request.max_output_tokens,
        logprobs=with_logprobs(request) or None,
        top_logprobs=request.top_logprobs,
        tools=tools or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        max_thinking_tokens=request.max_thinking_tokens,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        chat_template_kwargs=request.chat_template_kwargs,
        response_format=_response_format(wishes.format),
        verbosity=wishes.verbosity,
    )


@contextmanager
def in_our_words() -> Iterator[None]:
    """Errors of what the chat means name the fields of this API."""
    try:
        yield
    except (ApiError, InputError) as error:
        known = as_api_error(error)
        assert known is not None
        for theirs, ours in _WORDS.items():
            known.message = known.message.replace(theirs, ours)
            known.param = known.param and known.param.replace(theirs, ours)
        if known.param is not None and known.param.startswith("messages"):
            known.param = "input"
        raise known from None


def with_logprobs(request: kinds.ResponseRequest) -> bool:
    return kinds.INCLUDED[0] in (request.include or ()) or request.top_logprobs is not None


def _tool(given: dict[str, Any], path: str) -> schema.Tool:
    if given.get("type") != "function":
        kind = str(given.get("type"))[:100]
        raise not_supported(f"{path}.type", f"A tool of type {kind!r}", "give functions")
    tool = convert(given, kinds.FunctionTool, path)
    if tool.allowed_callers not in (None, ["direct"]):
        raise not_supported(f"{path}.allowed_callers")
    for name, field in (("run_async", "async"), ("defer_loading", "defer_loading")):
        if getattr(tool, name):
            raise not_supported(f"{path}.{field}")
    if tool.output_schema is not None:
        raise not_supported(f"{path}.output_schema")
    function = schema.Function(tool.name, tool.description, tool.parameters, tool.strict)
    return schema.Tool("function", function)


def _tool_choice(given: str | dict[str, Any] | None) -> Any:
    if not isinstance(given, dict):
        return given
    kind = given.get("type")
    if kind == "function":
        named = convert(given, kinds.ToolName, "tool_choice")
        return schema.NamedChoice(schema.FunctionName(named.name))
    if kind != "allowed_tools":
        raise not_supported("tool_choice.type", f"A tool_choice of type {str(kind)[:100]!r}")
    allowed = convert(given, kinds.AllowedTools, "tool_choice")
    names = [
        convert(one, kinds.ToolName, f"tool_choice.tools[{i}]").name
        for i, one in enumerate(allowed.tools)
    ]
    tools = [schema.NamedTool(schema.FunctionName(name)) for name in names]
    return schema.AllowedChoice(schema.AllowedTools(allowed.mode, tools))


def _response_format(given: kinds.TextFormat | None) -> schema.ResponseFormat | None:
    if given is None:
        return None
    fields = {n: getattr(given, n) for n in ("name", "schema", "description", "strict")}
    fields = {name: value for name, value in fields.items() if value is not None}
    wanted: dict[str, Any] = {"type": given.type}
    if fields or given.type == "json_schema":
        wanted["json_schema"] = fields
    return convert(wanted, schema.ResponseFormat, "response_format")


def shown(request: kinds.ResponseRequest) -> dict[str, Any]:
    """What the answer repeats of its request."""
    wishes = request.text or kinds.TextWishes()
    reasoning = request.reasoning or kinds.Reasoning()
    chosen = {"service_tier": prepare.tier_used(request)}  # type: ignore[arg-type]
    told = {"user": request.user, "safety_identifier": request.safety_identifier}
    return {
        "background": bool(request.background),
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": wishes.format or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": [
            {"description": None, "parameters": None, **tool, "strict": bool(tool.get("strict"))}
            for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        **{name: value for name, value in (chosen | told).items() if value is not None},
    }
