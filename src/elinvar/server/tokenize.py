"""/tokenize and /detokenize as vLLM has them: what a text or a conversation is to the model. And /version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar import __version__
from elinvar.engine.chat import ChatOptions
from elinvar.server.body import read_body
from elinvar.server.chats import Conversation, encode_chat, run_sized
from elinvar.server.errors import bad_request, invalid_value, not_supported
from elinvar.server.models import DEFAULT, Models
from elinvar.server.openai_messages import chat_messages, check_tools
from elinvar.server.reply import reply
from elinvar.server.schema import ChatRequest, Message, Tool, decode
from elinvar.server.served import Served


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    # Of chats.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    # Not served.
    chat_template: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tokens: list[int]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class TokenizeRoutes:
    models: Models
    max_body_bytes: int

    def routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        asked = decode(body, TokenizeRequest)
        for name in ("chat_template", "mm_processor_kwargs"):
            if getattr(asked, name):
                raise not_supported(name)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("Give a prompt or messages, and not both.", "prompt")
        served = (await self.models.use(request.scope, asked.model or DEFAULT)).served
        ids = await (_chat_ids if asked.prompt is None else _prompt_ids)(served, asked)
        tokenizer = served.core.tokenizer
        names = [tokenizer.token_text(i) for i in ids] if asked.return_token_strs else None
        told = {"count": len(ids), "max_model_len": served.core.max_context}
        return reply(told | {"tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        asked = decode(body, DetokenizeRequest)
        served = (await self.models.use(request.scope, asked.model or DEFAULT)).served
        size = served.core.model_config.vocab_size
        for i, token in enumerate(asked.tokens):
            if not 0 <= token < size:
                message = f"tokens[{i}] must be a token id from 0 to {size - 1}, got {token}."
                raise invalid_value(f"tokens[{i}]", message)
        return reply(
            {"prompt": await run_sized(len(asked.tokens), partial(_text, served), asked.tokens)}
        )


def _text(served: Served, ids: Sequence[int]) -> str:
    """With the names of control tokens, as they can be sent again."""
    spell = served.core.tokenizer.token_bytes
    return b"".join([spell(i) for i in ids]).decode("utf-8", "replace")


async def _prompt_ids(served: Served, asked: TokenizeRequest) -> list[int]:
    for name in (
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
        "tools",
    ):
        if getattr(asked, name):
            raise invalid_value(name, f"{name} is of chats; give messages instead of a prompt.")
    special = asked.add_special_tokens is not False
    encode = partial(served.core.tokenizer.encode, add_special=special)
    prompt = asked.prompt or ""
    return await run_sized(len(prompt), encode, prompt)


async def _chat_ids(served: Served, asked: TokenizeRequest) -> list[int]:
    if asked.add_special_tokens:
        remedy = "a chat has those that its template writes"
        raise not_supported("add_special_tokens", "add_special_tokens with messages", remedy)
    going_on = bool(asked.continue_final_message)
    if going_on and asked.add_generation_prompt:
        message = "A prompt that goes on with the last message has no generation prompt."
        raise invalid_value("add_generation_prompt", message)
    options = ChatOptions(
        variables=asked.chat_template_kwargs or {},
        add_generation_prompt=asked.add_generation_prompt is not False and not going_on,
        continue_final_message=going_on,
    )
    messages = chat_messages(ChatRequest(model="", messages=asked.messages or []))
    tools = check_tools(asked.tools or ())
    ids, _ = await encode_chat(served, Conversation(messages, tools=tools, options=options))
    return ids


async def version(request: Request) -> Response:
    return reply({"version": __version__})
