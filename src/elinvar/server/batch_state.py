"""Batches as they are stored: the object that clients see, and what its lines came to.

A line has one result: its key says so, whatever happened between. Files are made of the results when all
are there, in the order of the lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from elinvar.server.errors import ApiError, not_found
from elinvar.server.file_store import ACTIVE, add_file
from elinvar.server.reply import encode
from elinvar.server.store import Connection, Store

Body = dict[str, Any]

MAX_ACTIVE = 100
"""Of a tenant."""
MAX_AGE_S = 90 * 86400.0
"""How long those that ended are listed."""
_PAGE = 256


class Batches:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, tenant: str, body: Body) -> None:
        """Raises ApiError where its input is not there, or too many are active."""

        def task(db: Connection) -> None:
            now = time.time()
            db.execute(
                f"DELETE FROM batches WHERE created < ? AND NOT {ACTIVE}", (now - MAX_AGE_S,)
            )
            query = f"SELECT COUNT(*) FROM batches WHERE tenant = ? AND {ACTIVE}"
            if db.execute(query, (tenant,)).fetchone()[0] >= MAX_ACTIVE:
                message = f"{MAX_ACTIVE} of your batches have not ended; wait for one of them."
                raise ApiError(
                    429,
                    message,
                    None,
                    "batch_limit_exceeded",
                    "rate_limit_error",
                    {"Retry-After": "60"},
                )
            source = body["input_file_id"]
            query = "SELECT purpose FROM files WHERE id = ? AND tenant = ? AND expires > ?"
            row = db.execute(query, (source, tenant, now)).fetchone()
            if row is None or row[0] != "batch":
                raise not_found("file of the purpose 'batch'", source, "input_file_id")
            values = (body["id"], tenant, body["status"], now, source, encode(body))
            db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", values)

        await self._store.run(task)

    async def get(self, tenant: str, name: str) -> Body:
        return await self._store.run(lambda db: _read(db, name, tenant))

    async def of(self, tenant: str) -> list[Body]:
        """The tenant's, the newest first."""
        query = "SELECT body FROM batches WHERE tenant = ? ORDER BY created DESC, id DESC"
        rows = await self._store.run(lambda db: db.execute(query, (tenant,)).fetchall())
        return [msgspec.json.decode(body) for (body,) in rows]

    async def active(self) -> list[tuple[str, Body]]:
        """(tenant, batch) of those that have not ended, the oldest first."""
        query = f"SELECT tenant, body FROM batches WHERE {ACTIVE} ORDER BY created"
        rows = await self._store.run(lambda db: db.execute(query).fetchall())
        return [(tenant, msgspec.json.decode(body)) for tenant, body in rows]

    async def update(self, name: str, change: Callable[[Body], None]) -> Body:
        """What it is afterwards."""
        return await self._store.run(lambda db: _update(db, name, change))

    # ---- results --------------------------------------------------------------------------------

    async def done(self, name: str) -> set[int]:
        """The lines that have a result."""
        query = "SELECT line FROM results WHERE batch = ?"
        return {
            n for (n,) in await self._store.run(lambda db: db.execute(query, (name,)).fetchall())
        }

    async def add(self, name: str, line: int, good: bool, result: bytes, usage: Body) -> None:
        """The result of a line. There is one: a second one changes nothing."""

        def task(db: Connection) -> None:
            row = (name, line, good, result)
            if db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", row).rowcount:
                _update(db, name, lambda body: _count(body, good, usage))

        await self._store.run(task)

    async def results(self, name: str, after: int) -> list[tuple[int, bool, bytes]]:
        """(line, whether it is good, result) of the next ones behind the line `after`."""
        query = "SELECT line, good, result FROM results WHERE batch = ? AND line > ? "
        query += f"ORDER BY line LIMIT {_PAGE}"
        return await self._store.run(lambda db: db.execute(query, (name, after)).fetchall())

    async def end(
        self, name: str, files: list[tuple[Any, ...]], change: Callable[[Body], None]
    ) -> None:
        """It has its files, and no results any more."""

        def task(db: Connection) -> None:
            for row in files:
                add_file(db, row)
            db.execute("DELETE FROM results WHERE batch = ?", (name,))
            _update(db, name, change)

        await self._store.run(task)


def _read(db: Connection, name: str, tenant: str | None = None) -> Body:
    query = "SELECT body FROM batches WHERE id = ? AND tenant = IFNULL(?, tenant)"
    row = db.execute(query, (name, tenant)).fetchone()
    if row is None:
        raise not_found("batch", name, "batch_id")
    body: Body = msgspec.json.decode(row[0])
    return body


def _update(db: Connection, name: str, change: Callable[[Body], None]) -> Body:
    body = _read(db, name)
    change(body)
    row = (body["status"], encode(body), name)
    db.execute("UPDATE batches SET status = ?, body = ? WHERE id = ?", row)
    return body


def _count(body: Body, good: bool, usage: Body) -> None:
    body["request_counts"]["completed" if good else "failed"] += 1
    total = body["usage"]
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        total[name] += usage[name]
    total["input_tokens_details"]["cached_tokens"] += usage["cached_tokens"]
    total["output_tokens_details"]["reasoning_tokens"] += usage["reasoning_tokens"]
