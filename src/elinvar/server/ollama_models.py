"""The models as Ollama's API shows them: /api/tags, /api/show, /api/ps, /api/version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from elinvar.base.config import ModelConfig
from elinvar.server.body import read_body
from elinvar.server.errors import bad_request, not_supported, unknown_model
from elinvar.server.models import Models
from elinvar.server.ollama_schema import OllamaShowRequest
from elinvar.server.reply import reply
from elinvar.server.schema import decode
from elinvar.server.served import Served

API_VERSION = "0.12.6"
"""Of Ollama, whose API this is: clients ask it what they may use. Elinvar's own is in `elinvar`."""
_LATEST = ":latest"
_NEVER = "9999-12-31T23:59:59Z"


@dataclass(frozen=True, slots=True)
class Shown:
    """What there is to say of one model."""

    name: str
    config: ModelConfig
    digest: str
    created: int
    """Unix time."""
    max_context: int
    capabilities: Sequence[str]
    template: str = ""

    @property
    def details(self) -> dict[str, Any]:
        family = self.config.family
        return {
            "parent_model": "",
            "format": "",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": "",
        }

    @property
    def modified_at(self) -> str:
        return datetime.fromtimestamp(self.created, UTC).isoformat()

    @property
    def listed(self) -> dict[str, Any]:
        """As a list has it."""
        return {
            "name": self.name,
            "model": self.name,
            "modified_at": self.modified_at,
            "size": 0,
            "digest": self.digest,
            "details": self.details,
        }


def plain_name(name: str) -> str:
    """What clients call `name:latest` where nobody gave it a tag."""
    return name.removesuffix(_LATEST)


def shown_of(models: Models, scope: Scope) -> list[Shown]:
    """Those that are loaded: of others nothing is known yet but the name."""
    found = []
    for name in models.names_for(scope):
        served, adapter = models.look(scope, name)
        if served is not None:
            found.append(_shown(name, served, adapter))
    return found


def _shown(name: str, served: Served, adapter: str | None) -> Shown:
    core = served.core
    template = core.tokenizer.chat_template
    # Tools are told in the family's words also where its template has none for them.
    can = ["completion"] if template is None else ["completion", "tools"]
    if served.thinks:
        can.append("thinking")
    return Shown(
        name,
        core.model_config,
        core.fingerprint_of(adapter),
        served.created,
        core.max_context,
        can,
        "" if template is None else template.source,
    )


class OllamaModelRoutes:
    def __init__(self, shown: Callable[[Scope], Sequence[Shown]], max_body_bytes: int) -> None:
        self._shown, self._max_body_bytes = shown, max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/api/tags", self.tags, methods=["GET"]),
            Route("/api/ps", self.running, methods=["GET"]),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/version", self.version, methods=["GET"]),
        ]

    async def tags(self, request: Request) -> Response:
        return reply({"models": [one.listed for one in self._shown(request.scope)]})

    async def running(self, request: Request) -> Response:
        """All of them: they are loaded before the server listens, and stay."""
        models = [
            one.listed | {"expires_at": _NEVER, "size_vram": 0, "context_length": one.max_context}
            for one in self._shown(request.scope)
        ]
        return reply({"models": models})

    async def show(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        parsed = decode(body, OllamaShowRequest)
        for name in ("system", "template", "options"):
            if getattr(parsed, name):
                raise not_supported(name)
        wanted = parsed.model or parsed.name
        if wanted is None:
            message = "Missing required parameter: 'model'."
            raise bad_request(message, "model", "missing_required_parameter")
        there = {one.name: one for one in self._shown(request.scope)}
        one = there.get(wanted) or there.get(plain_name(wanted))
        if one is None:
            raise unknown_model(wanted, list(there))
        config, family = one.config, one.config.family
        info = {
            "general.architecture": family,
            f"{family}.context_length": one.max_context,
            f"{family}.embedding_length": config.dim,
            f"{family}.block_count": config.num_layers,
            f"{family}.attention.head_count": config.num_heads,
            f"{family}.attention.head_count_kv": config.num_kv_heads,
        }
        return reply(
            {
                "modelfile": f"FROM {one.name}\n",
                "parameters": "",
                "template": one.template,
                "details": one.details,
                "model_info": info,
                "capabilities": one.capabilities,
                "modified_at": one.modified_at,
            }
        )

    async def version(self, request: Request) -> Response:
        from elinvar import __version__

        return reply({"version": API_VERSION, "elinvar": __version__})
