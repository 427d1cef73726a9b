"""From a request of /v1/responses and the items of its conversation to an answer, ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.types import Scope

from elinvar.server import prepare
from elinvar.server.asked import Asked
from elinvar.server.chats import Conversation, Wanted, ask_chat
from elinvar.server.errors import ApiError, invalid_value
from elinvar.server.inside import handled
from elinvar.server.openai_messages import conversation
from elinvar.server.responses_items import Item
from elinvar.server.responses_request import as_chat, in_our_words
from elinvar.server.responses_schema import ResponseRequest
from elinvar.server.served import Target
from elinvar.server.tenants import tenant_of

ROOM_TO_ANSWER = 512
"""Tokens that a conversation cut to fit leaves to an answer of no given length, at least where the
context is large enough."""


async def ask_response(
    target: Target, scope: Scope, parsed: ResponseRequest, items: Sequence[Item]
) -> Asked:
    """The answer to the conversation of these items, ready to run."""
    with in_our_words():
        chat = as_chat(parsed, items)
        wanted = prepare.wanted(chat)
        policy = target.served.core.config.policy
        handling = handled(scope, prepare.handling(chat, tenant_of(scope), policy))
        said = replace(conversation(chat), field_name="input")
        ask = partial(ask_chat, target, wanted=wanted, handling=handling)
        try:
            return await ask(said)
        except ApiError as error:
            if parsed.truncation != "auto" or error.code != "context_length_exceeded":
                raise
            return await _shortened(ask, said, wanted, target)


async def _shortened(ask: Any, said: Conversation, wanted: Wanted, target: Target) -> Asked:
    """The conversation without as many of its first turns as it takes. A turn begins where the user
    speaks; what the system says before the first one stays."""
    messages = list(said.messages)
    starts = [i for i, one in enumerate(messages) if one["role"] == "user"]
    head = [one for one in messages[: starts[0] if starts else 0] if one["role"] == "system"]
    context = target.served.core.context_of(wanted.params)
    room = wanted.max_tokens or min(ROOM_TO_ANSWER, context // 4)
    roomy = replace(wanted, max_tokens=room)
    low, high, best = 1, len(starts) - 1, None
    while low <= high:
        middle = (low + high) // 2
        shorter = replace(said, messages=[*head, *messages[starts[middle] :]])
        try:
            await ask(shorter, wanted=roomy)
            best, high = shorter, middle - 1
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if best is None:
        raise invalid_value("input", "The last turn of the input alone is too long for the model.")
    return await ask(best, wanted=wanted)
