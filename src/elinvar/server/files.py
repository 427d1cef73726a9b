"""/v1/files: what clients upload for batches, and what batches wrote.

Contents are files of the state folder, named by their id; the database says whose they are and what they
are called. A content is there when its row is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from elinvar.server.body import READ_SECONDS, drain
from elinvar.server.errors import ApiError, ClientGoneError, invalid_value, not_found, not_supported
from elinvar.server.multipart import Begin, Multipart
from elinvar.server.pages import Page
from elinvar.server.reply import reply
from elinvar.server.store import Connection, Store, as_told
from elinvar.server.tenants import tenant_of

MAX_FILE_BYTES = 200 * 2**20
"""OpenAI's own limit of a batch's input."""
MAX_TENANT_BYTES = 10 * 2**30
MAX_AGE_S = 30 * 86400
MIN_AGE_S = 3600
MAX_LISTED = 10_000
_EXPIRE_S = 3600.0
_MAX_FIELD = 1024
_MAX_NAME = 255
_COLUMNS = "id, purpose, name, bytes, created, expires"
ACTIVE = "status NOT IN ('failed', 'completed', 'expired', 'cancelled')"
"""Batches that still read their input."""


@dataclass(slots=True)
class Content:
    """One that is being written; it is gone if it is not kept."""

    id: str
    path: Path
    file: BinaryIO
    size: int = 0

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        await asyncio.to_thread(self.file.write, data)

    async def settle(self) -> None:
        """It outlives the machine under its name from now on, and waits for its row."""
        await asyncio.to_thread(self._settle)

    def _settle(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.path.with_suffix(".part").rename(self.path)


class Files:
    def __init__(
        self,
        store: Store,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_tenant_bytes: int = MAX_TENANT_BYTES,
    ) -> None:
        self.max_file_bytes, self._max_tenant_bytes = max_file_bytes, max_tenant_bytes
        self._store = store
        self._expired = time.monotonic()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Content]:
        """A new content. Raises OSError as files do; ApiError for a folder that cannot be used."""
        await self._store.run(lambda db: None)
        if time.monotonic() - self._expired > _EXPIRE_S:
            await self.expire()
        name = f"file-{uuid.uuid4().hex}"
        path = self._store.files / name
        part = path.with_suffix(".part")
        file = await asyncio.to_thread(part.open, "xb", 2**20)
        try:
            yield Content(name, path, file)
        finally:
            with contextlib.suppress(OSError):  # a full disk was told before
                await asyncio.to_thread(file.close)
            part.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        return self._store.files

    def path(self, name: str) -> Path:
        return self._store.files / name

    async def keep(
        self, content: Content, tenant: str, purpose: str, name: str, age_s: float
    ) -> dict[str, Any]:
        now = time.time()
        row = (content.id, tenant, purpose, name, content.size, now, now + age_s)

        def task(db: Connection) -> None:
            query = "SELECT TOTAL(bytes) FROM files WHERE tenant = ?"
            held = db.execute(query, (tenant,)).fetchone()[0]
            if held + content.size > self._max_tenant_bytes:
                raise ApiError(
                    413,
                    f"Your files may have {self._max_tenant_bytes} bytes; delete some.",
                    "file",
                    "storage_limit_exceeded",
                )
            add_file(db, row)

        try:
            await self._store.run(task)
        except Exception:
            content.path.unlink(missing_ok=True)
            raise
        return _shown((content.id, *row[2:]))

    async def get(self, tenant: str, name: str) -> dict[str, Any]:
        return await self._store.run(lambda db: _shown(_row(db, tenant, name)))

    async def of(self, tenant: str, purpose: str | None, order: str) -> list[dict[str, Any]]:
        """The tenant's, by the time at which they were made: asc or desc."""
        query = f"SELECT {_COLUMNS} FROM files WHERE tenant = ? AND purpose = IFNULL(?, purpose) "
        query += f"AND expires > ? ORDER BY created {order}, id {order}"
        now = time.time()
        rows = await self._store.run(
            lambda db: db.execute(query, (tenant, purpose, now)).fetchall()
        )
        return [_shown(row) for row in rows]

    async def delete(self, tenant: str, name: str) -> None:
        def task(db: Connection) -> None:
            _row(db, tenant, name)
            user = db.execute(f"SELECT id FROM batches WHERE input = ? AND {ACTIVE}", (name,))
            if (batch := user.fetchone()) is not None:
                message = f"The batch {batch[0]} reads this file; cancel it or wait for its end."
                raise ApiError(409, message, "file_id", "file_in_use")
            db.execute("DELETE FROM files WHERE id = ?", (name,))

        await self._store.run(task)
        self.path(name).unlink(missing_ok=True)

    async def expire(self) -> None:
        """Removes what is too old."""

        def task(db: Connection) -> list[tuple[str]]:
            used = f"SELECT input FROM batches WHERE {ACTIVE}"
            old = f"DELETE FROM files WHERE expires < ? AND id NOT IN ({used}) RETURNING id"
            return db.execute(old, (time.time(),)).fetchall()

        for (name,) in await self._store.run(task):
            self.path(name).unlink(missing_ok=True)
        self._expired = time.monotonic()

    async def sweep(self) -> None:
        """At the start: contents without a row are of writers that were cut off."""
        query = "SELECT id FROM files"
        known = {name for (name,) in await self._store.run(lambda db: db.execute(query).fetchall())}
        for path in await asyncio.to_thread(lambda: list(self.folder.iterdir())):
            if path.name not in known:
                path.unlink(missing_ok=True)
        await self.expire()


def add_file(db: Connection, row: tuple[Any, ...]) -> None:
    """row: id, tenant, purpose, name, bytes, created, expires."""
    db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def _row(db: Connection, tenant: str, name: str) -> tuple[Any, ...]:
    query = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND tenant = ? AND expires > ?"
    row: tuple[Any, ...] | None = db.execute(query, (name, tenant, time.time())).fetchone()
    if row is None:
        raise not_found("file", name, "file_id")
    return row


def _shown(row: tuple[Any, ...]) -> dict[str, Any]:
    name, purpose, filename, size, created, expires = row
    return {
        "id": name,
        "object": "file",
        "bytes": size,
        "created_at": int(created),
        "expires_at": int(expires),
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
    }


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
                raise _too_large(self.files.max_file_bytes)
            async with self.files.writing() as content:
                fields, name = await self._receive(request, form, content)
                purpose, age_s = _read_fields(fields)
                if name is None:
                    raise invalid_value("file", "Missing required parameter: 'file'.")
                await content.settle()
                tenant = tenant_of(request.scope)
                return reply(await self.files.keep(content, tenant, purpose, name, age_s))
        except ApiError as error:
            if error.status == 413:
                await drain(request.receive)
            raise
        except OSError as error:
            raise as_told(error, self.files.folder) from error

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
                        raise _too_large(self.files.max_file_bytes)
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


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The file is larger than this server's limit of {limit} bytes.",
        "file",
        "request_too_large",
        headers={"Connection": "close"},
    )
