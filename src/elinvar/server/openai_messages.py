"""OpenAI's messages and tools as a Conversation. No engine and no HTTP here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from elinvar.engine.chat import ChatOptions
from elinvar.server.chats import Conversation
from elinvar.server.errors import bad_request, invalid_value, not_supported
from elinvar.server.schema import (
    AllowedChoice,
    ChatRequest,
    ContentPart,
    Message,
    NamedChoice,
    Tool,
    ToolCall,
)

MAX_TOOLS = 128
"""OpenAI's own limit."""
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")

Choice = Literal["auto", "none", "required", "named"]


def conversation(request: ChatRequest) -> Conversation:
    """What the prompt is made from, and what the model may do. Raises ApiError naming the field."""
    tools = check_tools(request.tools or ())
    tools, choice, name = choose_tools(tools, request.tool_choice)
    options = ChatOptions(
        variables=request.chat_template_kwargs or {}, reasoning_effort=request.reasoning_effort
    )
    return Conversation(
        chat_messages(request),
        tools=tools,
        tool_choice=choice,
        tool_name=name,
        parallel_calls=request.parallel_tool_calls is not False,
        options=options,
    )


# ---- messages -----------------------------------------------------------------------------------


def chat_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages as chat templates take them: role, content, and what belongs to calls of tools."""
    if not request.messages:
        raise invalid_value("messages", "messages must hold at least one message, got none.")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(request.messages)]


def _message(message: Message, path: str) -> dict[str, Any]:
    if message.role == "function":
        raise not_supported(f"{path}.role", "The role 'function'", "send role 'tool'")
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise not_supported(f"{path}.{name}")
    # Templates know the older word for OpenAI's `developer`.
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role}
    calls = message.tool_calls
    if calls and role != "assistant":
        raise invalid_value(f"{path}.tool_calls", "Only an assistant's message has tool_calls.")
    if message.content is not None or message.refusal is not None or not calls:
        result["content"] = _content(message, f"{path}.content")
    if calls:
        result["tool_calls"] = [
            _call(one, f"{path}.tool_calls[{i}]") for i, one in enumerate(calls)
        ]
    if role == "tool":
        if message.tool_call_id is None:
            field = f"{path}.tool_call_id"
            raise bad_request(
                f"Missing required parameter: '{field}'.", field, "missing_required_parameter"
            )
        result["tool_call_id"] = message.tool_call_id
    elif message.tool_call_id is not None:
        raise invalid_value(f"{path}.tool_call_id", "Only a tool's message has a tool_call_id.")
    thoughts = message.reasoning_content or message.reasoning
    if thoughts is not None:
        if role != "assistant":
            raise invalid_value(f"{path}.reasoning_content", "Only an assistant's message has it.")
        result["reasoning_content"] = thoughts
    if message.name is not None:
        result["name"] = message.name
    return result


def _call(call: ToolCall, path: str) -> dict[str, Any]:
    """As templates take it: with its arguments as JSON text, as OpenAI writes them."""
    if call.type != "function":
        raise not_supported(f"{path}.type", f"A call of type {call.type[:100]!r}")
    function = {"name": call.function.name, "arguments": call.function.arguments}
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"{path}.function.arguments"
        raise invalid_value(field, f"{field} must be the JSON text of an object.")
    return {"id": call.id, "type": "function", "function": function}


def _content(message: Message, path: str) -> str | list[dict[str, str]]:
    content = message.content
    if content is None and message.refusal is not None:
        return message.refusal
    if content is None:
        raise bad_request(f"Missing required parameter: '{path}'.", path, "invalid_type")
    if isinstance(content, str):
        return content
    if not content:
        raise invalid_value(path, f"{path} must hold at least one part, got none.")
    return [_part(part, f"{path}[{i}]") for i, part in enumerate(content)]


def _part(part: ContentPart, path: str) -> dict[str, str]:
    kind, text = ("text", part.text) if part.type == "text" else ("refusal", part.refusal)
    if part.type != kind:
        raise not_supported(path, f"Content of type {part.type[:100]!r}")
    if text is None:
        name = f"{path}.{kind}"
        raise bad_request(
            f"Missing required parameter: '{name}'.", name, "missing_required_parameter"
        )
    return {"type": "text", "text": text}


# ---- tools --------------------------------------------------------------------------------------


def check_tools(tools: Sequence[Tool], field: str = "tools") -> list[dict[str, Any]]:
    """The functions as templates take them."""
    if len(tools) > MAX_TOOLS:
        raise invalid_value(field, f"{field} may hold {MAX_TOOLS} tools, got {len(tools)}.")
    seen: set[str] = set()
    checked = []
    for i, tool in enumerate(tools):
        path = f"{field}[{i}]"
        if tool.type != "function" or tool.function is None:
            raise not_supported(f"{path}.type", f"A tool of type {tool.type[:100]!r}")
        name = tool.function.name
        if not TOOL_NAME.fullmatch(name):
            raise invalid_value(
                f"{path}.function.name",
                f"{path}.function.name must be 1 to 128 letters, digits or any of _ . : -, "
                f"got {name[:150]!r}.",
            )
        if name in seen:
            raise invalid_value(f"{path}.function.name", f"There are two functions named {name!r}.")
        seen.add(name)
        function: dict[str, Any] = {"name": name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        # Templates read the parameters without asking whether there are any.
        function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
        if tool.function.strict:
            function["strict"] = True
        checked.append({"type": "function", "function": function})
    return checked


def choose_tools(
    tools: list[dict[str, Any]], choice: str | NamedChoice | AllowedChoice | None
) -> tuple[list[dict[str, Any]], Choice, str | None]:
    """(the tools that may be called, the choice, the name of the one that must be)."""
    names = [tool["function"]["name"] for tool in tools]
    if choice is None:
        return tools, "auto", None
    if isinstance(choice, NamedChoice):
        _check_named(choice.function.name, names)
        return tools, "named", choice.function.name
    if isinstance(choice, AllowedChoice):
        allowed = {one.function.name for one in choice.allowed_tools.tools}
        for name in sorted(allowed):
            _check_named(name, names)
        kept = [tool for tool in tools if tool["function"]["name"] in allowed]
        return kept, choice.allowed_tools.mode, None
    if choice not in ("auto", "none", "required"):
        message = f"tool_choice must be auto, none, required or an object, got {choice[:100]!r}."
        raise invalid_value("tool_choice", message)
    if choice == "required" and not tools:
        raise invalid_value("tool_choice", "tool_choice is required, but there are no tools.")
    return tools, choice, None  # type: ignore[return-value]


def _check_named(name: str, names: Sequence[str]) -> None:
    if name not in names:
        there = ", ".join(names) or "none"
        message = f"tool_choice names {name[:100]!r}; the tools are {there}."
        raise invalid_value("tool_choice", message)
