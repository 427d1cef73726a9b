"""Ollama's messages and options as a Conversation and what is Wanted. No engine, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from elinvar.base.grammar import JsonSchema
from elinvar.base.sampling import MAX_LOGPROBS, SamplingParams
from elinvar.engine.chat import ChatOptions
from elinvar.server.chats import Conversation, Wanted
from elinvar.server.errors import invalid_value, not_supported
from elinvar.server.formats import ANY_OBJECT
from elinvar.server.ollama_schema import (
    UNSERVED,
    UNSERVED_OPTIONS,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaRequest,
    OllamaTool,
)
from elinvar.server.schema import refuse_unserved

OWN_NAMES = {
    "max_tokens": "options.num_predict",
    "temperature": "options.temperature",
    "top_k": "options.top_k",
    "top_p": "options.top_p",
    "min_p": "options.min_p",
    "typical_p": "options.typical_p",
    "repetition_penalty": "options.repeat_penalty",
    "presence_penalty": "options.presence_penalty",
    "frequency_penalty": "options.frequency_penalty",
    "seed": "options.seed",
    "stop": "options.stop",
    "session": "session_id",
    "thinking": "think",
    "max_thinking_tokens": "think",
    "reasoning_effort": "think",
}
"""What this API calls the fields of what is inside."""
TEMPERATURE, TOP_K, TOP_P = 0.8, 40, 0.9
"""Ollama's defaults."""
_NO_LIMIT = -1, -2
"""Of num_predict: as many as there is room for."""


def chat(request: OllamaChatRequest, thinking: bool | None) -> Conversation:
    """What the prompt is made from. Raises ApiError naming the field.

    thinking: ChatOptions.thinking, which depends on the model, too (chats.thinking_way)."""
    return Conversation(
        _messages(request.messages or ()),
        tools=[_tool(tool) for tool in request.tools or ()],
        options=_options(request, thinking),
    )


def prompted(request: OllamaGenerateRequest, thinking: bool | None) -> Conversation:
    """The same of a prompt that is not `raw`."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    messages = [*system, {"role": "user", "content": request.prompt or ""}]
    return Conversation(messages, options=_options(request, thinking), field_name="prompt")


def wants_thoughts(request: OllamaRequest) -> bool | None:
    """None: as the model is, or as much as `think` says."""
    return request.think if isinstance(request.think, bool) else None


def wanted(request: OllamaRequest, max_context: int, most_thoughts: int | None) -> Wanted:
    """Everything but the prompt, checked. Raises ApiError or InputError. most_thoughts: tokens of
    them."""
    refuse_unserved(request, UNSERVED)
    given = request.options or OllamaOptions()
    refuse_unserved(given, UNSERVED_OPTIONS, "options.")
    limit = None if given.num_predict in _NO_LIMIT else given.num_predict
    if limit is not None and limit < 1:
        raise invalid_value("options.num_predict", "options.num_predict must be at least 1, or -1.")
    context = given.num_ctx
    if context is not None and not 1 <= context <= max_context:
        message = f"options.num_ctx must be from 1 to this server's {max_context}, got {context}."
        raise invalid_value("options.num_ctx", message)
    stop = given.stop or ()
    params = SamplingParams(
        max_tokens=1,
        temperature=TEMPERATURE if given.temperature is None else given.temperature,
        top_k=TOP_K if given.top_k is None else given.top_k,
        top_p=TOP_P if given.top_p is None else given.top_p,
        min_p=given.min_p or 0.0,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        repetition_penalty=_repeat_penalty(given),
        presence_penalty=given.presence_penalty or 0.0,
        frequency_penalty=given.frequency_penalty or 0.0,
        seed=given.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=_num_logprobs(request),
        grammar=_grammar(request.format),
    )
    return Wanted(
        1,
        limit,
        params,
        grammar_field="format",
        max_thinking_tokens=most_thoughts,
        cut_to_room=True,
        max_context=context,
    )


def _grammar(form: str | dict[str, Any] | None) -> JsonSchema | None:
    if isinstance(form, dict):
        return JsonSchema(msgspec.json.encode(form).decode())
    if form not in (None, "", "json"):
        raise invalid_value("format", "format must be 'json' or a JSON schema.")
    return ANY_OBJECT if form else None


def _repeat_penalty(given: OllamaOptions) -> float:
    """Of all tokens that there are: none is forgotten after a while."""
    if given.repeat_last_n not in (None, -1, 0):
        name = "options.repeat_last_n"
        raise invalid_value(name, f"{name} must be -1, all tokens, or 0, none.")
    if given.repeat_penalty is None or given.repeat_last_n == 0:
        return 1.0
    return given.repeat_penalty


def _num_logprobs(request: OllamaRequest) -> int | None:
    top = request.top_logprobs
    if top is None:
        return 0 if request.logprobs else None
    if not request.logprobs:
        raise invalid_value("top_logprobs", "top_logprobs needs logprobs to be true.")
    if not 0 <= top <= MAX_LOGPROBS:
        message = f"top_logprobs must be an integer from 0 to {MAX_LOGPROBS}, got {top}."
        raise invalid_value("top_logprobs", message)
    return top


def _options(request: OllamaRequest, thinking: bool | None) -> ChatOptions:
    effort = request.think if isinstance(request.think, str) else None
    return ChatOptions(thinking=thinking, reasoning_effort=effort)


def _tool(tool: OllamaTool) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    function: dict[str, Any] = {"name": tool.function.name, "parameters": parameters}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.strict is not None:
        function["strict"] = tool.function.strict
    return {"type": "function", "function": function}


def _messages(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """As chat templates take them. Results of tools belong to calls in their order, where they do not
    say to which."""
    found = []
    open_calls: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        if message.images:
            raise not_supported(f"messages[{i}].images")
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking is not None:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = turn["tool_calls"] = _calls(message, i)
            open_calls = [(call["id"], call["function"]["name"]) for call in calls]
        if message.role == "tool":
            turn |= _answered(message, open_calls)
        found.append(turn)
    return found


def _calls(message: OllamaMessage, at: int) -> list[dict[str, Any]]:
    calls = []
    for k, call in enumerate(message.tool_calls or ()):
        arguments = msgspec.json.encode(call.function.arguments).decode()
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id or f"call_{at}_{k}", "type": "function", "function": function})
    return calls


def _answered(message: OllamaMessage, open_calls: list[tuple[str, str]]) -> dict[str, str]:
    """The call that a tool's message answers, which is open no more."""
    wanted_id, wanted_name = message.tool_call_id, message.tool_name
    for call_id, name in open_calls:
        if wanted_id in (None, call_id) and wanted_name in (None, name):
            open_calls.remove((call_id, name))
            return {"tool_call_id": call_id, "name": name}
    given = {"tool_call_id": wanted_id, "name": wanted_name}
    return {key: value for key, value in given.items() if value is not None}
