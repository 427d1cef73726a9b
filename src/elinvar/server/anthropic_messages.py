"""Anthropic's messages, tools and settings as a Conversation and what is Wanted. No engine, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from elinvar.base.grammar import JsonSchema
from elinvar.base.sampling import SamplingParams
from elinvar.engine.chat import ChatOptions
from elinvar.server.anthropic_schema import (
    UNSERVED,
    AnyBlock,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolResultBlock,
    ToolUseBlock,
)
from elinvar.server.anthropic_tools import function_tools, tool_choice
from elinvar.server.chats import Conversation, Wanted
from elinvar.server.errors import invalid_value, not_supported
from elinvar.server.schema import refuse_unserved

_BETWEEN = "\n\n"
"""Between texts that are not one in the API, and are one to a template."""
OWN_NAMES = {
    "stop": "stop_sequences",
    "session": "session_id",
    "reasoning_effort": "output_config.effort",
    "thinking": "thinking.type",
    "max_thinking_tokens": "thinking",
}
"""What this API calls the fields of what is inside."""

Message = dict[str, Any]


def conversation(request: CountTokensRequest, thinking: bool | None) -> Conversation:
    """What the prompt is made from, and what the model may do. Raises ApiError naming the field.

    thinking: ChatOptions.thinking, which depends on the model, too (chats.thinking_way)."""
    refuse_unserved(request, UNSERVED)
    turns = _Turns()
    if request.system:
        turns.add("system", _text(request.system, "system"))
    if not request.messages:
        raise invalid_value("messages", "messages must hold at least one message, got none.")
    for i, message in enumerate(request.messages):
        turns.push(message, f"messages[{i}]")
    choice, tool_name, parallel = tool_choice(request)
    return Conversation(
        turns.messages,
        tools=function_tools(request.tools or ()),
        tool_choice=choice,
        tool_name=tool_name,
        parallel_calls=parallel,
        options=_options(request, thinking),
    )


def wants_thoughts(request: CountTokensRequest) -> bool | None:
    """None: as the model is."""
    kinds = {ThinkingEnabled: True, ThinkingDisabled: False}
    return next(
        (value for kind, value in kinds.items() if isinstance(request.thinking, kind)), None
    )


def wanted(request: MessagesRequest, most_thoughts: int | None) -> Wanted:
    """Everything but the prompt, checked. Raises ApiError naming the field. most_thoughts: tokens of
    them, where the request does not say."""
    if request.max_tokens < 1:
        message = f"max_tokens must be at least 1, got {request.max_tokens}."
        raise invalid_value("max_tokens", message)
    if isinstance(request.thinking, ThinkingEnabled):
        name, most_thoughts = "thinking.budget_tokens", request.thinking.budget_tokens
        if most_thoughts < 1:
            raise invalid_value(name, f"{name} must be at least 1, got {most_thoughts}.")
    form = request.output_config.format if request.output_config else None
    params = SamplingParams(
        max_tokens=1,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=request.seed,
        stop=tuple(request.stop_sequences or ()),
        grammar=None if form is None else JsonSchema(msgspec.json.encode(form.schema).decode()),
    )
    return Wanted(
        1,
        request.max_tokens,
        params,
        grammar_field="output_config.format.schema",
        max_thinking_tokens=most_thoughts,
        # As with Anthropic's later models: clients ask for as much as those can, whatever the model.
        cut_to_room=True,
    )


def has_cache_control(request: CountTokensRequest) -> bool:
    """Whether the client asked anywhere for something to be cached."""
    blocks: list[Any] = [request, *(request.tools or ())]
    texts = [request.system, *(message.content for message in request.messages)]
    for content in texts:
        if isinstance(content, list):
            blocks += content
            inner = (b.content for b in content if isinstance(b, ToolResultBlock))
            blocks += [b for part in inner if isinstance(part, list) for b in part]
    return any(block.cache_control is not None for block in blocks)


# ---- messages -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turns:
    """Messages as chat templates take them. Turns of one role that follow each other are one."""

    messages: list[Message] = field(default_factory=list)
    _calls: dict[str, str] = field(default_factory=dict)
    """The names of the tools that were called, by id."""

    def push(self, message: InputMessage, path: str) -> None:
        content = message.content
        if message.role == "system":
            blocks = content if isinstance(content, str) else [*content]
            self.add("system", _text(blocks, f"{path}.content"))
        elif isinstance(content, str):
            self.add(message.role, content)
        elif not content:
            raise invalid_value(f"{path}.content", f"{path}.content must hold a block, got none.")
        elif message.role == "user":
            for i, block in enumerate(content):
                self._user(block, f"{path}.content[{i}]")
        else:
            self._assistant(content, f"{path}.content")

    def add(self, role: str, text: str) -> None:
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != role:
            self.messages.append({"role": role, "content": text})
        elif (before := last.get("content")) is None:
            last["content"] = text
        else:
            last["content"] = before + _BETWEEN + text

    def _user(self, block: AnyBlock, path: str) -> None:
        if isinstance(block, TextBlock):
            self.add("user", _said(block, path))
        elif isinstance(block, ToolResultBlock):
            name = self._calls.get(block.tool_use_id)
            if name is None:
                field_name = f"{path}.tool_use_id"
                message = f"{field_name} is that of no tool_use block in the messages before."
                raise invalid_value(field_name, message)
            text = _text(block.content or "", f"{path}.content")
            # Templates have no word for a result that is an error.
            text = f"Error: {text}" if block.is_error else text
            result = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
            self.messages.append(result | {"name": name})
        else:
            raise _unserved(block, path)

    def _assistant(self, blocks: Sequence[AnyBlock], path: str) -> None:
        texts, thoughts, calls = [], [], []
        for i, block in enumerate(blocks):
            if isinstance(block, TextBlock):
                texts.append(_said(block, f"{path}[{i}]"))
            elif isinstance(block, ThinkingBlock):
                thoughts.append(block.thinking)
            elif isinstance(block, ToolUseBlock):
                self._calls[block.id] = block.name
                arguments = msgspec.json.encode(block.input).decode()
                function = {"name": block.name, "arguments": arguments}
                calls.append({"id": block.id, "type": "function", "function": function})
            else:
                raise _unserved(block, f"{path}[{i}]")
        if texts or not calls:
            self.add("assistant", "".join(texts))
        elif not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant"})
        turn = self.messages[-1]
        if thoughts:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(thoughts)
        if calls:
            turn["tool_calls"] = [*turn.get("tool_calls", ()), *calls]


def _text(content: str | Sequence[AnyBlock], path: str) -> str:
    if isinstance(content, str):
        return content
    return _BETWEEN.join(_said(block, f"{path}[{i}]") for i, block in enumerate(content))


def _said(block: AnyBlock, path: str) -> str:
    if not isinstance(block, TextBlock):
        raise _unserved(block, path)
    if block.citations:
        raise not_supported(f"{path}.citations")
    return block.text


def _unserved(block: AnyBlock, path: str) -> Exception:
    return not_supported(path, f"A block of type {block.__struct_config__.tag!r} here")


def _options(request: CountTokensRequest, thinking: bool | None) -> ChatOptions:
    return ChatOptions(
        variables=request.chat_template_kwargs or {},
        thinking=thinking,
        reasoning_effort=request.output_config.effort if request.output_config else None,
        # What an assistant has begun to say is gone on with.
        continue_final_message=request.messages[-1].role == "assistant",
    )
