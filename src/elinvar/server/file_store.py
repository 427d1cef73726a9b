"""Contents of files in the state folder, named by their id, and the database that says whose they are and
what they are called. A content is there when its row is.
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

from elinvar.server.errors import FULL_STATUS, ApiError, not_found
from elinvar.server.store import Connection, Store

MAX_FILE_BYTES = 200 * 2**20
"""OpenAI's own limit of a batch's input."""
MAX_TENANT_BYTES = 10 * 2**30
_EXPIRE_S = 3600.0
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

    def as_told(self, error: OSError) -> ApiError:
        """See Store.as_told."""
        return self._store.as_told(error)

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
        def check(db: Connection) -> None:
            _row(db, tenant, name)
            user = db.execute(f"SELECT id FROM batches WHERE input = ? AND {ACTIVE}", (name,))
            if (batch := user.fetchone()) is not None:
                message = f"The batch {batch[0]} reads this file; cancel it or wait for its end."
                raise ApiError(409, message, "file_id", "file_in_use")

        def forget(db: Connection) -> None:
            db.execute("DELETE FROM files WHERE id = ?", (name,))

        await self._store.run(check)
        try:
            await self._store.run(forget)
            self.path(name).unlink(missing_ok=True)
        except ApiError as error:
            if error.status != FULL_STATUS:
                raise
            # Even forgetting takes a little room: the content makes it.
            self.path(name).unlink(missing_ok=True)
            await self._store.run(forget)

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
