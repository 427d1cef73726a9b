"""Responses that are stored: what they said, and the items from which a conversation goes on.

Each tenant sees its own. What is not used for long goes, and what was used longest ago where a tenant
has too much of it; using a response is using all those before it, so conversations go as a whole.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from elinvar.server.errors import ApiError, bad_request, invalid_value, not_found
from elinvar.server.reply import encode
from elinvar.server.responses_items import Item
from elinvar.server.store import Connection, Store

MAX_AGE_S = 30 * 86400.0
"""OpenAI's own."""
MAX_TENANT_BYTES = 256 * 2**20
OPEN = "queued", "in_progress"
_SWEEP_S = 3600.0
_ARE_OPEN = "status IN ('queued', 'in_progress')"
_CHAIN = """
WITH RECURSIVE chain (id, previous, status, depth) AS (
    SELECT id, previous, status, 0 FROM responses WHERE id = ? AND tenant = ?
    UNION ALL
    SELECT r.id, r.previous, r.status, depth + 1 FROM responses r
    JOIN chain ON r.id = chain.previous WHERE r.tenant = ?
) SELECT id, previous, status FROM chain ORDER BY depth DESC
"""
_OLDEST = f"""
DELETE FROM responses WHERE id IN (
    SELECT id FROM (
        SELECT id, SUM(bytes) OVER (ORDER BY used DESC, created DESC) AS total
        FROM responses WHERE tenant = ? AND NOT {_ARE_OPEN}
    ) WHERE total > ?
)
"""


@dataclass(slots=True)
class Kept:
    """A response as it is stored."""

    tenant: str
    result: dict[str, Any]
    """The response object."""
    given: Sequence[Item]
    """The items of its own input."""
    request: bytes | None = None
    """What it takes to run it again, while it has not ended."""
    events: Sequence[bytes] = ()
    """Of one that ran in the background, in order."""


class Responses:
    def __init__(
        self,
        store: Store,
        max_tenant_bytes: int = MAX_TENANT_BYTES,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._store = store
        self._max_bytes, self._max_age_s = max_tenant_bytes, max_age_s
        self._held: dict[str, int] = {}
        """Bytes of tenants, as far as known."""
        self._swept = 0.0

    # ---- one response ---------------------------------------------------------------------------

    async def save(self, kept: Kept) -> None:
        """It is there when this returns, in the place of what was stored under its id."""
        try:
            await self._store.run(lambda db: self._save(db, kept))
        except ApiError:
            self._held.pop(kept.tenant, None)  # what was counted did not happen
            raise

    async def get(self, tenant: str, name: str) -> bytes:
        """Its JSON. Raises ApiError 404."""
        found = await self._store.run(lambda db: _row(db, tenant, name, "body"))
        return bytes(found[0])

    async def events(self, tenant: str, name: str) -> list[bytes]:
        found = await self._store.run(lambda db: _row(db, tenant, name, "events"))
        if found[0] is None:
            message = "Only what runs in the background can be streamed later on."
            raise invalid_value("stream", message)
        events: list[bytes] = msgspec.msgpack.decode(zlib.decompress(found[0]))
        return events

    async def delete(self, tenant: str, name: str) -> None:
        def task(db: Connection) -> None:
            (size,) = _row(db, tenant, name, "bytes")
            held = self._held_by(db, tenant)
            db.execute("DELETE FROM responses WHERE id = ?", (name,))
            self._held[tenant] = held - size

        await self._store.run(task)

    async def open(self) -> list[tuple[str, str, float, bytes, list[Item]]]:
        """(id, tenant, created, request, input items) of those that had not ended."""

        def task(db: Connection) -> list[tuple[str, str, float, bytes, list[Item]]]:
            query = f"SELECT id, tenant, created, request, inputs FROM responses WHERE {_ARE_OPEN}"
            rows = db.execute(f"{query} ORDER BY created").fetchall()
            return [(*row[:4], _items(db, row[0], row[4])) for row in rows]

        return await self._store.run(task) if self._store.has_something else []

    # ---- conversations --------------------------------------------------------------------------

    async def before(
        self, tenant: str, previous: str | None, given: Sequence[Item]
    ) -> tuple[list[Item], list[Item]]:
        """(what was said up to and with the response `previous`, `given` with what its references
        name). Raises ApiError naming the field."""
        wanted = {item["id"] for item in given if item["type"] == "item_reference"}
        if previous is None and not wanted:
            return [], list(given)

        def task(db: Connection) -> tuple[list[Item], dict[str, Item]]:
            said = [] if previous is None else self._said(db, tenant, previous)
            return said, {name: _referenced(db, tenant, name) for name in wanted}

        said, found = await self._store.run(task)
        return said, [found[i["id"]] if i["type"] == "item_reference" else i for i in given]

    async def inputs(self, tenant: str, name: str) -> list[Item]:
        """All that a response was made from, what was said before it included."""

        def task(db: Connection) -> list[Item]:
            previous, count = _row(db, tenant, name, "previous, inputs")
            said = [] if previous is None else self._said(db, tenant, previous)
            return [*said, *_items(db, name, count)]

        return await self._store.run(task)

    def _said(self, db: Connection, tenant: str, last: str) -> list[Item]:
        chain = db.execute(_CHAIN, (last, tenant, tenant)).fetchall()
        if not chain or chain[0][1] is not None:
            gone = chain[0][1] if chain else last
            raise _unknown_previous(gone)
        if chain[-1][2] in OPEN:
            message = f"The response {last!r} has not ended; wait for it or cancel it."
            raise bad_request(message, "previous_response_id", "response_not_ended")
        now = time.time()
        db.executemany("UPDATE responses SET used = ? WHERE id = ?", [(now, c[0]) for c in chain])
        items = (item for one in chain for item in _items(db, one[0]))
        return [item for item in items if not _broken(item)]

    # ---- within a transaction -------------------------------------------------------------------

    def _save(self, db: Connection, kept: Kept) -> None:
        result, now = kept.result, time.time()
        name, output = result["id"], result["output"]
        items = [encode(item) for item in (*kept.given, *output)]
        body = encode(result)
        events = None
        if kept.events:
            events = zlib.compress(msgspec.msgpack.encode(kept.events), 1)
        size = len(body) + sum(map(len, items)) + len(kept.request or b"") + len(events or b"")
        held = self._held_by(db, kept.tenant)
        old = db.execute("SELECT bytes FROM responses WHERE id = ?", (name,)).fetchone()
        db.execute("DELETE FROM responses WHERE id = ?", (name,))
        row: tuple[Any, ...] = (name, kept.tenant, result["status"], result["previous_response_id"])
        row += (result["created_at"], now, size, len(kept.given), body, kept.request, events)
        db.execute(f"INSERT INTO responses VALUES ({', '.join('?' * len(row))})", row)
        rows = _item_rows(name, (*kept.given, *output), items)
        db.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)
        self._held[kept.tenant] = held + size - (old[0] if old else 0)
        self._forget(db, kept.tenant, now)

    def _forget(self, db: Connection, tenant: str, now: float) -> None:
        if self._held[tenant] > self._max_bytes:
            # A tenth more than needed, so that it is not done again at once.
            db.execute(_OLDEST, (tenant, self._max_bytes * 9 // 10))
            del self._held[tenant]
        if now - self._swept > _SWEEP_S:
            old = f"DELETE FROM responses WHERE used < ? AND NOT {_ARE_OPEN}"
            if db.execute(old, (now - self._max_age_s,)).rowcount:
                self._held.clear()
            self._swept = now

    def _held_by(self, db: Connection, tenant: str) -> int:
        if tenant not in self._held:
            query = "SELECT TOTAL(bytes) FROM responses WHERE tenant = ?"
            self._held[tenant] = int(db.execute(query, (tenant,)).fetchone()[0])
        return self._held[tenant]


def _row(db: Connection, tenant: str, name: str, columns: str) -> tuple[Any, ...]:
    query = f"SELECT {columns} FROM responses WHERE id = ? AND tenant = ?"
    row: tuple[Any, ...] | None = db.execute(query, (name, tenant)).fetchone()
    if row is None:
        raise not_found("response", name, "response_id")
    return row


def _items(db: Connection, response: str, count: int = -1) -> list[Item]:
    """The first `count` of them; -1: all, what it answered included."""
    query = "SELECT item FROM items WHERE response = ? ORDER BY position LIMIT ?"
    return [msgspec.json.decode(item) for (item,) in db.execute(query, (response, count))]


def _item_rows(
    response: str, items: Iterable[Item], encoded: Sequence[bytes]
) -> list[tuple[str, int, str, bytes]]:
    pairs = zip(items, encoded, strict=True)
    return [(response, i, item["id"], raw) for i, (item, raw) in enumerate(pairs)]


def _referenced(db: Connection, tenant: str, name: str) -> Item:
    query = (
        "SELECT item FROM items JOIN responses r ON r.id = response "
        "WHERE items.id = ? AND tenant = ? ORDER BY r.created DESC LIMIT 1"
    )
    row = db.execute(query, (name, tenant)).fetchone()
    if row is None:
        raise ApiError(404, f"input refers to an item {name[:200]!r} that is not stored.", "input")
    item: Item = msgspec.json.decode(row[0])
    return item


def _broken(item: Item) -> bool:
    """A call that was cut off: its arguments are no JSON."""
    return item["type"] == "function_call" and item["status"] == "incomplete"


def _unknown_previous(name: str) -> ApiError:
    message = f"The response {name[:200]!r} is not stored; send what was said before as items."
    return bad_request(message, "previous_response_id", "previous_response_not_found")
