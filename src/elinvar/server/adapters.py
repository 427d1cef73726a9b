"""Loading and unloading LoRA adapters over HTTP, under the names that vLLM gave these endpoints.

A path is one of this machine: whoever may ask is trusted with its folders, so the endpoints are only
there when the server was started so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from elinvar.base.errors import InputError, ModelError
from elinvar.server.body import read_body
from elinvar.server.errors import ApiError, invalid_value
from elinvar.server.schema import LoadAdapterRequest, UnloadAdapterRequest, decode

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.server.models import Models


class AdapterRoutes:
    """Adapters of the default model."""

    def __init__(self, models: Models, max_body_bytes: int) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
        ]

    async def load_adapter(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        asked = decode(body, LoadAdapterRequest)
        engine = await self._engine(request)
        if asked.lora_name in self._models.own_names:
            raise invalid_value("lora_name", f"'{asked.lora_name}' is a model's own name.")
        try:
            await engine.load_adapter(asked.lora_name, asked.lora_path)
        except InputError as error:
            raise invalid_value("lora_name", str(error)) from None
        except ModelError as error:
            raise invalid_value("lora_path", str(error)) from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        asked = decode(body, UnloadAdapterRequest)
        engine = await self._engine(request)
        try:
            await engine.unload_adapter(asked.lora_name)
        except InputError as error:
            raise ApiError(404, str(error), "lora_name", "model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def _engine(self, request: Request) -> AsyncEngine:
        target = await self._models.use(request.scope, self._models.default)
        return target.served.engine
