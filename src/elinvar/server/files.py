"""/v1/files: what clients upload for batches, and what batches wrote."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from elinvar.server.body import READ_SECONDS, drain
from elinvar.server.errors import ApiError, ClientGoneError, invalid_value, not_supported
from elinvar.server.file_store import Content, Files
from elinvar.server.multipart import Begin, Multipart
from elinvar.server.pages import Page
from elinvar.server.reply import reply
from elinvar.server.tenants import tenant_of

MAX_AGE_S = 30 * 86400
MIN_AGE_S = 3600
MAX_LISTED = 10_000
_MAX_FIELD = 1024
_MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class FileRoutes:
    files: Files

    def routes(self) -> list[Route]:
        one = "/v1/files/{id}"
        return [
            Route("/v1/files", self.create_file, methods=["POST"]),
            Route("/v1/files", self.list_files, methods=["GET"]),
            Route(one, self.get_file, methods=["GET"]),
            Route(one, self.delete_file, methods=["DELETE"]),
            Route(f"{one}/content", self.get_file_content, methods=["GET"]),
        ]

    async def create_file(self, request: Request) -> Response:
        form = Multipart(request.headers.get("content-type", ""))
        size = request.headers.get("content-length", "0")
        try:
            # A form is a little more than its file.
            if int(size) > self.files.max_file_bytes + 2**16:
                raise await _too_large(request, self.files.max_file_bytes)
            async with self.files.writing() as content:
                fields, name = await self._receive(request, form, content)
                purpose, age_s = _read_fields(fields)
                if name is None:
                    raise invalid_value("file", "Missing required parameter: 'file'.")
                await content.settle()
                tenant = tenant_of(request.scope)
                return reply(await self.files.keep(content, tenant, purpose, name, age_s))
        except OSError as error:
            raise self.files.as_told(error) from error

    async def list_files(self, request: Request) -> Response:
        page = Page.of(request, MAX_LISTED, MAX_LISTED)
        purpose = request.query_params.get("purpose")
        return reply(page.cut(await self.files.of(tenant_of(request.scope), purpose, page.order)))

    async def get_file(self, request: Request) -> Response:
        return reply(await self.files.get(*_named(request)))

    async def get_file_content(self, request: Request) -> Response:
        found = await self.files.get(*_named(request))
        path = self.files.path(found["id"])
        return FileResponse(path, media_type="application/octet-stream")

    async def delete_file(self, request: Request) -> Response:
        tenant, name = _named(request)
        await self.files.delete(tenant, name)
        return reply({"id": name, "object": "file", "deleted": True})

    async def _receive(
        self, request: Request, form: Multipart, content: Content
    ) -> tuple[dict[str, str], str | None]:
        """(the form's fields, the file's name); the file goes into `content`."""
        fields: dict[str, bytes] = {}
        name: str | None = None
        part, more = "", True
        while not form.ended:
            if not more:
                message = "The form of the request body ends before its last boundary."
                raise invalid_value("file", message)
            data, more = await _next(request)
            for event in form.feed(data):
                if isinstance(event, Begin):
                    part = event.name
                    if part == "file" and name is not None:
                        raise invalid_value("file", "A form holds one file.")
                    if part == "file":
                        name = (event.filename or "file")[:_MAX_NAME]
                    else:
                        fields[part] = b""
                elif part == "file":
                    await content.write(event)
                    if content.size > self.files.max_file_bytes:
                        raise await _too_large(request, self.files.max_file_bytes)
                else:
                    fields[part] += event
                    if len(fields[part]) > _MAX_FIELD:
                        raise invalid_value(part[:200], f"{part[:200]} is too long.")
        texts = {field: value.decode("utf-8", "replace") for field, value in fields.items()}
        return texts, name


async def _next(request: Request) -> tuple[bytes, bool]:
    """More of the body, and whether that is not all; it may be long, but it must go on."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            message = await request.receive()
    except TimeoutError:
        text = f"Nothing more of the request body arrived within {READ_SECONDS:g} s."
        raise ApiError(408, text, code="timeout", headers={"Connection": "close"}) from None
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


def _read_fields(fields: dict[str, str]) -> tuple[str, float]:
    """(purpose, seconds to keep it). Raises ApiError naming the field."""
    purpose = fields.pop("purpose", None)
    if purpose is None:
        raise invalid_value("purpose", "Missing required parameter: 'purpose'.")
    if purpose != "batch":
        raise not_supported("purpose", f"The purpose {purpose[:100]!r}", "there is batch")
    anchor = fields.pop("expires_after[anchor]", None)
    seconds = fields.pop("expires_after[seconds]", None)
    if fields:
        name = min(fields)[:200]
        message = f"Unrecognized request argument supplied: {name}"
        raise ApiError(400, message, name, "unknown_parameter")
    if anchor is None and seconds is None:
        return purpose, MAX_AGE_S
    return purpose, read_age(anchor, int(seconds) if seconds and seconds.isdecimal() else None)


def read_age(anchor: str | None, seconds: int | None, field: str = "expires_after") -> float:
    if anchor != "created_at":
        raise invalid_value(f"{field}.anchor", f"{field}.anchor must be created_at.")
    if seconds is None or not MIN_AGE_S <= seconds <= MAX_AGE_S:
        message = f"{field}.seconds must be from {MIN_AGE_S} to {MAX_AGE_S}."
        raise invalid_value(f"{field}.seconds", message)
    return seconds


def _named(request: Request) -> tuple[str, str]:
    return tenant_of(request.scope), request.path_params["id"]


async def _too_large(request: Request, limit: int) -> ApiError:
    # With `expect` the client waits to be told, otherwise it is writing.
    if "expect" not in request.headers:
        await drain(request.receive)
    return ApiError(
        413,
        f"The file is larger than this server's limit of {limit} bytes.",
        "file",
        "request_too_large",
        headers={"Connection": "close"},
    )
