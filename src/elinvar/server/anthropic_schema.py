"""The bodies of Anthropic's Messages API. What the values mean is anthropic_messages' business.

As with OpenAI's: unknown fields are refused, a null counts as not given. Blocks and tools of types that
are not here are refused by msgspec, with the path of their type.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class CacheControl(msgspec.Struct, forbid_unknown_fields=True):
    """Where a client wants a prefix cached. All prompts are here, so it decides but how tokens are
    counted."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    """A part of a message."""

    cache_control: CacheControl | None = None


class TextBlock(Block, tag="text"):
    text: str
    citations: list[Any] | None = None


class ImageBlock(Block, tag="image"):
    """Known for its refusal, and the next two."""

    source: Any = None
    transformations: Any = None


class DocumentBlock(Block, tag="document"):
    source: Any = None
    title: str | None = None
    context: str | None = None
    citations: Any = None


class RedactedThinkingBlock(Block, tag="redacted_thinking"):
    data: str = ""


class ThinkingBlock(Block, tag="thinking"):
    thinking: str
    signature: str | None = None
    """Whatever it says: nobody is kept from changing what the model thought."""


class ToolUseBlock(Block, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    toolset_name: str | None = None


class ToolResultBlock(Block, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


AnyBlock = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | RedactedThinkingBlock
    | ThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
)


class InputMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class ToolDefinition(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    # What asks for nothing is taken.
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None


class AutoTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class NamedTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="tool"):
    name: str
    disable_parallel_tool_use: bool | None = None


class NoTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="none"):
    pass


Display = Literal["summarized", "omitted"]


class ThinkingEnabled(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="enabled"):
    budget_tokens: int
    display: Display | None = None


class ThinkingAdaptive(
    msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="adaptive"
):
    display: Display | None = None


class ThinkingDisabled(
    msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="disabled"
):
    pass


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class CountTokensRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the prompt is made from; it is the beginning of a MessagesRequest, too."""

    model: str
    messages: list[InputMessage]
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: AutoTool | AnyTool | NamedTool | NoTool | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    # Not Anthropic's: what else the model's chat template reads.
    chat_template_kwargs: dict[str, Any] | None = None
    # Not served, and what of it asks for nothing.
    context_management: Any = None
    mcp_servers: list[Any] | None = None
    output_format: Any = None
    speed: Literal["standard", "fast"] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # Accepted; it changes nothing here.
    metadata: Metadata | None = None
    # Not Anthropic's: as with OpenAI's API.
    min_p: float | None = None
    seed: int | None = None
    priority: int | None = None
    session_id: str | None = None
    expect_return_s: float | None = None
    pause_kind: str | None = None
    # Not served.
    container: Any = None
    diagnostics: Any = None
    inference_geo: str | None = None


UNSERVED: dict[str, tuple[object, ...]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_format": (),
    "speed": ("standard",),
}
"""Fields that are not served, with the values that ask for nothing."""
