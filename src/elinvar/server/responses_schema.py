"""The request bodies of /v1/responses, and the items that a conversation is made of there."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from elinvar.server.schema import Common

Items = list[dict[str, Any]]


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    # Served as far as it asks for nothing.
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextWishes(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseRequest(Common, kw_only=True):
    """With all of `Common` that has a meaning here: its extensions are served, too."""

    input: str | Items | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    reasoning: Reasoning | None = None
    text: TextWishes | None = None
    tools: Items | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    # Extensions, as chats have them.
    chat_template_kwargs: dict[str, Any] | None = None
    max_thinking_tokens: int | None = None
    # Shown again in the answer; they change nothing here.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Not served.
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None


class InputTokensRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What of a ResponseRequest makes its prompt."""

    model: str
    input: str | Items | None = None
    instructions: str | None = None
    reasoning: Reasoning | None = None
    text: TextWishes | None = None
    tools: Items | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # Not served.
    conversation: Any = None
    personality: str | None = None


# ---- tools --------------------------------------------------------------------------------------


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    # Served as far as they ask for nothing.
    run_async: bool | None = msgspec.field(default=None, name="async")
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class ToolName(msgspec.Struct, forbid_unknown_fields=True):
    """As `tool_choice` names a function."""

    type: Literal["function"]
    name: str


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items


# ---- items --------------------------------------------------------------------------------------


class MessageItem(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Items
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["input_text", "output_text", "refusal", "text", "summary_text", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None
    # What clients send back of an answer.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None
    # Not served.
    prompt_cache_breakpoint: Any = None


class CallItem(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = None
    # Not served.
    run_async: bool | None = msgspec.field(default=None, name="async")
    caller: dict[str, Any] | None = None
    namespace: str | None = None


class CallOutputItem(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Items
    id: str | None = None
    status: str | None = None
    name: str | None = None
    # Not served.
    caller: dict[str, Any] | None = None
    namespace: str | None = None


class ReasoningItem(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["reasoning"]
    id: str | None = None
    summary: Items | None = None
    content: Items | None = None
    encrypted_content: str | None = None
    status: str | None = None


class Reference(msgspec.Struct, forbid_unknown_fields=True):
    """An item that is stored."""

    id: str
    type: Literal["item_reference"] | None = None


ITEM_KINDS: dict[str, type[msgspec.Struct]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": Reference,
}

NOT_SERVED: dict[str, tuple[object, ...]] = {
    "access_programs": ({},),
    "background_options": ({}, {"completion_window": "soonest"}),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "personality": (),
    "prompt": (),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory",),
}
"""Fields that are known and not served, with the values that ask for nothing."""

INCLUDED = "message.output_text.logprobs", "reasoning.encrypted_content"
"""What `include` may name: the others belong to hosted tools and to images."""
