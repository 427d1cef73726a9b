"""Conversations, whichever API they came by: from messages and tools to what the engine is asked.

Every chat API is translated into a `Conversation` and what is `Wanted` of it; the way from there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from elinvar.base.handling import Handling
from elinvar.base.sampling import SamplingParams
from elinvar.engine.chat import ChatOptions
from elinvar.engine.seeds import choice_seed
from elinvar.server.asked import Asked
from elinvar.server.errors import invalid_value, too_long
from elinvar.server.served import Served, Target
from elinvar.server.service import Choice

Given = TypeVar("Given")
Ids = TypeVar("Ids")

_INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that the streams of others go on."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is said, and what the model may do next."""

    messages: Sequence[Mapping[str, Any]]
    """As chat templates take them: role, content, and what else OpenAI's messages have (tool_calls,
    tool_call_id, reasoning_content)."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions, as OpenAI writes them: {"type": "function", "function": {...}}."""
    tool_choice: Literal["auto", "none", "required", "named"] = "auto"
    tool_name: str | None = None
    """Where the choice is `named`."""
    parallel_calls: bool = True
    options: ChatOptions = field(default_factory=ChatOptions)
    """The template's, but for the tools."""
    field_name: str = "messages"
    """What the API calls the messages, for its errors."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of every prompt."""

    n: int
    max_tokens: int | None
    """What the client allows in one answer; None where it did not say."""
    params: SamplingParams
    """All but max_tokens, which depends on the prompt, and the adapter, which is the target's."""
    cut_to_room: bool = False
    """Where max_tokens is more than there is room for, the answer ends with the context; else that is
    an error."""
    max_context: int | None = None
    """Tokens of prompt and answer, where that is less than what the model has."""


async def ask_chat(
    target: Target, conversation: Conversation, wanted: Wanted, handling: Handling
) -> Asked:
    """The answers to a conversation, ready to run. Raises ApiError, InputError or ModelError for what
    the model does not take."""
    served = target.served
    served.service.check_count(wanted.n, "n", handling.tenant)
    prompt = await encode_chat(served, conversation)
    choices = make_choices(target, wanted, [prompt], None, conversation.field_name)
    return Asked(served, choices, handling)


def switches_thinking(served: Served) -> bool:
    """Whether the model's thinking can be switched on and off."""
    template = served.core.tokenizer.chat_template
    return template is not None and template.switches_thinking


async def encode_chat(served: Served, conversation: Conversation) -> list[int]:
    """The prompt. Raises InputError or ModelError for what the model does not take."""
    options = conversation.options
    if conversation.tools and conversation.tool_choice != "none":
        options = replace(options, tools=conversation.tools)
    size = text_length(conversation.messages)
    encode = partial(served.core.encode_chat, options=options)
    return await run_sized(size, encode, conversation.messages)


def make_choices(
    target: Target,
    wanted: Wanted,
    prompts: Sequence[list[int]],
    default_tokens: int | None,
    field_name: str,
) -> list[Choice]:
    """All choices of prompt 0 first, as OpenAI orders them.

    `default_tokens`: max_tokens where the client said nothing; None: as many as fit.
    """
    choices = []
    params = replace(wanted.params, adapter=target.adapter)
    context = target.served.core.context_of(params)
    if wanted.max_context is not None:
        context = min(context, wanted.max_context)
    limit, default = wanted.max_tokens, default_tokens
    if limit is not None and wanted.cut_to_room:
        limit, default = None, limit
    for p, ids in enumerate(prompts):
        if not ids:
            raise invalid_value(field_name, f"{field_name} must hold at least one token.")
        room = fit(limit, default, len(ids), context, field_name)
        for k in range(wanted.n):
            seed = None if params.seed is None else choice_seed(params.seed, k)
            own = replace(params, max_tokens=room, seed=seed)
            top = params.prompt_logprobs
            choices.append(Choice(p * wanted.n + k, p, ids, own, prompt_top=top))
    return choices


def fit(limit: int | None, default: int | None, num_prompt: int, context: int, param: str) -> int:
    """max_tokens of one prompt of `num_prompt` tokens in a context of `context` tokens.

    What the client asked for must fit; a default (None: as much as there is) is cut to what does.
    """
    room = context - num_prompt
    if room < 1:
        raise too_long(context, num_prompt, limit, param)
    if limit is None:
        return room if default is None else min(default, room)
    if limit > room:
        raise too_long(context, num_prompt, limit, param)
    return limit


def text_length(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of the messages; each costs something even where it is empty."""
    contents = [m.get("content") or "" for m in messages]
    texts = [c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents]
    return sum(len(text) + 64 for text in texts)


async def run_sized(num_chars: int, tokenise: Callable[[Given], Ids], given: Given) -> Ids:
    """Here where it is short, in a thread where it is not."""
    if num_chars <= _INLINE_CHARS:
        return tokenise(given)
    return await asyncio.to_thread(tokenise, given)
