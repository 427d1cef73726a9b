"""Conversations, whichever API they came by: from messages and tools to what the engine is asked.

Every chat API is translated into a `Conversation` and what is `Wanted` of it; the way from there is one.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from elinvar.base.handling import Handling
from elinvar.base.sampling import SamplingParams
from elinvar.engine.bad_words import spelled
from elinvar.engine.chat import ChatOptions
from elinvar.engine.seeds import choice_seed
from elinvar.server.asked import Asked
from elinvar.server.errors import invalid_value, too_long
from elinvar.server.formats import make_ready
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
    grammar_field: str = "grammar"
    """What the API calls where the grammar came from, for its errors."""
    max_thinking_tokens: int | None = None
    """Of all thoughts of an answer; None: any number."""
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
    prompt, begun = await encode_chat(served, conversation)
    params = _understood(served, conversation, wanted, begun)
    field = wanted.grammar_field if wanted.params.grammar else "tools"
    await make_ready(served.engine, params.grammar, field)
    wanted = replace(wanted, params=params)
    choices = make_choices(target, wanted, [prompt], None, conversation.field_name)
    tools = _may_be_called(conversation)
    reader = partial(served.dialect.reader, tools, begun, _call_id)
    return Asked(served, choices, handling, reader)


async def encode_chat(served: Served, conversation: Conversation) -> tuple[list[int], bool]:
    """The prompt, and whether it ends in an open thought. Raises InputError or ModelError for what the
    model does not take."""
    size = text_length(conversation.messages) + sum(len(str(t)) for t in conversation.tools)
    return await run_sized(size, partial(_encode, served), conversation)


def thinking_way(served: Served, wanted: bool | None) -> tuple[bool | None, int | None]:
    """(ChatOptions.thinking, Wanted.max_thinking_tokens) of a client that wants thoughts, or none, or
    does not say. Where the template has no switch, models that never think have none as it is, and
    those that always do must be kept from it."""
    template = served.core.tokenizer.chat_template
    if wanted is None or (template is not None and template.switches_thinking):
        return wanted, None
    if wanted:
        return (None if served.thinks else True), None
    return None, (0 if served.thinks else None)


def _encode(served: Served, conversation: Conversation) -> tuple[list[int], bool]:
    """The prompt, and whether it ends in an open thought."""
    messages, tools = served.dialect.prompt(
        conversation.messages, _may_be_called(conversation) or None
    )
    options = replace(conversation.options, tools=tools or None)
    text = served.core.render_chat(messages, options)
    begun = served.dialect.begins_in_thought(text)
    return served.core.tokenizer.encode_chat(text), begun


def _may_be_called(conversation: Conversation) -> Sequence[Mapping[str, Any]]:
    return () if conversation.tool_choice == "none" else conversation.tools


def _understood(
    served: Served, conversation: Conversation, wanted: Wanted, begun: bool
) -> SamplingParams:
    """The parameters by which the answer is one that its reader understands, and keeps to what was
    asked for. begun: the prompt ends in an open thought."""
    dialect, params, thinks = served.dialect, wanted.params, served.thinks
    grammar, tools = params.grammar, _may_be_called(conversation)
    if conversation.tool_choice in ("required", "named"):
        choice = conversation.tool_name or "required"
        grammar = dialect.grammar(tools, choice, conversation.parallel_calls, thinks, begun)
    elif grammar is not None:
        grammar = dialect.saying(grammar, thinks, begun)
    elif tools:
        grammar = dialect.grammar(tools, "auto", conversation.parallel_calls, thinks, begun)
    thinking = None
    if (most := wanted.max_thinking_tokens) is not None:
        encode = partial(served.core.tokenizer.encode, add_special=False)
        thinking = dialect.thinking_budget(most, begun, encode)
    return replace(
        params,
        grammar=grammar,
        thinking=thinking,
        special_text=dialect.special_text,
        stop_token_ids=(*params.stop_token_ids, *dialect.end_ids),
    )


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


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
    if params.bad_words:  # once for all, and not in the thread that steps
        words = spelled(target.served.core.tokenizer, params.bad_words)
        params = replace(params, bad_words=words)
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
