"""The endpoints of Ollama's API that ask a model for a text: /api/chat and /api/generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from elinvar.base.handling import Handling
from elinvar.server.answer import Answer
from elinvar.server.asked import Asked
from elinvar.server.body import read_body
from elinvar.server.chats import Wanted, ask_chat, make_choices, run_sized, thinking_way
from elinvar.server.errors import invalid_value, own_names
from elinvar.server.formats import make_ready
from elinvar.server.inside import handled
from elinvar.server.models import Models
from elinvar.server.ollama_messages import OWN_NAMES, chat, prompted, wanted, wants_thoughts
from elinvar.server.ollama_models import plain_name
from elinvar.server.ollama_schema import OllamaChatRequest, OllamaGenerateRequest, OllamaRequest
from elinvar.server.ollama_wire import OllamaChatWire, OllamaGenerateWire, OllamaWire, now
from elinvar.server.prepare import hinted
from elinvar.server.reply import reply
from elinvar.server.schema import decode
from elinvar.server.served import Target
from elinvar.server.tenants import tenant_of


@dataclass(frozen=True, slots=True)
class OllamaRoutes:
    models: Models
    max_body_bytes: int

    def routes(self) -> list[Route]:
        return [
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
        ]

    async def chat(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        parsed = decode(body, OllamaChatRequest)
        target, asks, handling, thinking = await self._checked(request, parsed)
        if not parsed.messages:
            return _loaded(parsed, {"message": {"role": "assistant", "content": ""}})
        with own_names(OWN_NAMES):
            said = chat(parsed, thinking)
            asked = await ask_chat(target, said, asks, handling)
        return _answer(parsed, asked, OllamaChatWire)

    async def generate(self, request: Request) -> Any:
        body = await read_body(request.scope, request.receive, self.max_body_bytes)
        parsed = decode(body, OllamaGenerateRequest)
        target, asks, handling, thinking = await self._checked(request, parsed)
        if not parsed.prompt:
            return _loaded(parsed, {"response": ""})
        with own_names(OWN_NAMES):
            if parsed.raw:
                asked = await _ask_raw(target, parsed, asks, handling)
            else:
                said = prompted(parsed, thinking)
                asked = await ask_chat(target, said, asks, handling)
        return _answer(parsed, asked, OllamaGenerateWire)

    async def _checked(
        self, request: Request, parsed: OllamaRequest
    ) -> tuple[Target, Wanted, Handling, bool | None]:
        known = self.models.has(request.scope, parsed.model)
        name = parsed.model if known else plain_name(parsed.model)
        target = await self.models.use(request.scope, name)
        core = target.served.core
        with own_names(OWN_NAMES):
            thinking, most = thinking_way(target.served, wants_thoughts(parsed))
            asks = wanted(parsed, core.max_context, most)
            handling = hinted(parsed, tenant_of(request.scope), core.config.policy)
            return target, asks, handled(request.scope, handling), thinking


async def _ask_raw(
    target: Target, parsed: OllamaGenerateRequest, asks: Wanted, handling: Handling
) -> Asked:
    """The prompt as it is, without a template."""
    for name in ("system", "think"):
        if getattr(parsed, name):
            raise invalid_value(
                name, f"{name} belongs to a template; leave it out where raw is true."
            )
    prompt = parsed.prompt or ""
    ids = await run_sized(len(prompt), target.served.core.tokenizer.encode, prompt)
    await make_ready(target.served.engine, asks.params.grammar, "format")
    choices = make_choices(target, asks, [ids], None, "prompt")
    return Asked(target.served, choices, handling)


def _answer(parsed: OllamaRequest, asked: Asked, kind: type[OllamaWire]) -> Answer:
    served = asked.served
    times = served.service.explanations.parts_of
    wire = kind(parsed.model, served.names, times, with_logprobs=bool(parsed.logprobs))
    return Answer(asked, wire, stream=parsed.stream is not False)


def _loaded(parsed: OllamaRequest, said: dict[str, Any]) -> Any:
    """Who asks for nothing wants the model to be there, and it is."""
    unloads = parsed.keep_alive in (0, "0", "0s")
    reason = "unload" if unloads else "load"
    fields = {"model": parsed.model, "created_at": now()}
    return reply(fields | said | {"done": True, "done_reason": reason})
