"""Anthropic's tools and tool_choice in the words of a Conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from elinvar.server.anthropic_schema import (
    AnyTool,
    CountTokensRequest,
    NamedTool,
    NoTool,
    ToolDefinition,
)
from elinvar.server.errors import invalid_value, not_supported
from elinvar.server.openai_messages import MAX_TOOLS, TOOL_NAME

ToolChoice = Literal["auto", "none", "required", "named"]


def function_tools(tools: Sequence[ToolDefinition]) -> list[dict[str, Any]]:
    """As OpenAI writes them. Raises ApiError naming the field."""
    if len(tools) > MAX_TOOLS:
        raise invalid_value("tools", f"tools may hold {MAX_TOOLS} of them, got {len(tools)}.")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if not TOOL_NAME.fullmatch(tool.name):
            message = f"tools[{i}].name must be 1 to 128 letters, digits or any of _ . : -."
            raise invalid_value(f"tools[{i}].name", message)
        if tool.name in seen:
            message = f"tools[{i}].name: there are two tools named {tool.name!r}."
            raise invalid_value(f"tools[{i}].name", message)
        seen.add(tool.name)
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _tool(tool: ToolDefinition, path: str) -> dict[str, Any]:
    if tool.allowed_callers not in (None, ["direct"]):
        raise not_supported(f"{path}.allowed_callers")
    if tool.defer_loading:
        raise not_supported(f"{path}.defer_loading")
    if tool.eager_input_streaming is False:
        message = "Holding the input of a tool back until it is whole"
        raise not_supported(f"{path}.eager_input_streaming", message)
    if tool.input_examples:
        raise not_supported(f"{path}.input_examples")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def tool_choice(request: CountTokensRequest) -> tuple[ToolChoice, str | None, bool]:
    """(choice, the tool's name, whether several may be called at once)."""
    choice = request.tool_choice
    if choice is None or isinstance(choice, NoTool):
        return ("auto" if choice is None else "none"), None, True
    names = [tool.name for tool in request.tools or ()]
    if not names:
        raise invalid_value("tool_choice", "tool_choice needs tools, too.")
    parallel = not choice.disable_parallel_tool_use
    if isinstance(choice, NamedTool):
        if choice.name not in names:
            there = ", ".join(names)
            message = f"tool_choice.name is {choice.name[:200]!r}; the tools are {there}."
            raise invalid_value("tool_choice.name", message)
        return "named", choice.name, parallel
    return ("required" if isinstance(choice, AnyTool) else "auto"), None, parallel
