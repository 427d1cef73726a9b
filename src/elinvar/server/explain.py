"""Explaining requests: GET /v1/requests/{id}/explain, and the header Server-Timing.

Owns what is kept of answers that run or ended lately. The thread that steps writes into it, the
event loop reads; each entry is of one HTTP request and has a record a choice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.engine.watch import Record, record
from elinvar.server.errors import ApiError
from elinvar.server.reply import reply
from elinvar.server.tenants import tenant_of

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.output import FinishReason
    from elinvar.sched.request import Request as EngineRequest

MAX_RECORDS = 1000
"""Records of choices that ended; older ones are forgotten."""
_HEADER_NAMES = {"queued": "queue"}
_ALWAYS = "queued", "prefill", "decode"


@dataclass(slots=True, eq=False)
class _Entry:
    response_id: str
    request_id: str
    tenant: str
    size: int
    """Choices that were asked for."""
    before_first: dict[int, dict[str, int]] = field(default_factory=dict)
    """Nanoseconds in each state until a choice's first token."""
    ended: dict[int, Record] = field(default_factory=dict)


def choice_id(response_id: str, index: int) -> str:
    """What the engine calls one choice of an answer."""
    return f"{response_id}-{index}"


def answer_id(engine_id: str) -> str:
    """The answer that such a choice belongs to; what is no choice's id stays as it is."""
    answer, dash, index = engine_id.rpartition("-")
    return answer if dash and index.isdecimal() else engine_id


def not_found(wanted: str) -> ApiError:
    return ApiError(
        404,
        f"No request '{wanted[:200]}' runs or ended lately; give the id of an answer, or "
        "its x-request-id.",
        "id",
        "request_not_found",
    )


class Explanations:
    """A Watcher of the engine."""

    def __init__(self, engine: AsyncEngine, max_records: int = MAX_RECORDS) -> None:
        self._engine = engine
        self._max_records = max_records
        self._entries: dict[str, _Entry] = {}
        self._by_request: dict[tuple[str, str], _Entry] = {}
        self._closed: deque[_Entry] = deque()
        self._num_closed = 0
        engine.engine.watchers.append(self)

    @contextmanager
    def following(
        self, response_id: str, request_id: str, tenant: str, size: int
    ) -> Iterator[None]:
        """While an answer of `size` choices runs."""
        entry = _Entry(response_id, request_id, tenant, size)
        self._entries[response_id] = self._by_request[tenant, request_id] = entry
        try:
            yield
        finally:
            self._close(entry)

    def _close(self, entry: _Entry) -> None:
        self._closed.append(entry)
        self._num_closed += entry.size
        while self._num_closed > self._max_records and len(self._closed) > 1:
            old = self._closed.popleft()
            self._num_closed -= old.size
            del self._entries[old.response_id]
            key = old.tenant, old.request_id
            if self._by_request.get(key) is old:
                del self._by_request[key]

    def began(self, request: EngineRequest) -> None:
        entry, index = self._of(request)
        if entry is not None:
            entry.before_first[index] = request.ledger.parts(request.first_token or 0.0)

    def ended(self, request: EngineRequest, reason: FinishReason) -> None:
        entry, index = self._of(request)
        if entry is not None:
            entry.ended[index] = record(request, reason)

    def _of(self, request: EngineRequest) -> tuple[_Entry | None, int]:
        response_id, _, index = request.id.rpartition("-")
        entry = self._entries.get(response_id)
        return entry, 0 if entry is None else int(index)

    def records_of(self, response_id: str) -> Mapping[int, Record]:
        """Of its choices that ended, as they do; nothing where it was never followed."""
        entry = self._entries.get(response_id)
        return {} if entry is None else entry.ended

    # ---- the header -------------------------------------------------------------------------

    def timing_of_all(self, response_id: str) -> list[tuple[bytes, bytes]]:
        """Server-Timing of a whole answer."""
        parts = self.parts_of(response_id)
        return _server_timing(parts, (*_ALWAYS, "total")) if parts else []

    def parts_of(self, response_id: str) -> dict[str, int]:
        """Nanoseconds in each state, and `total`, of the choice that ended last; nothing where none
        has."""
        entry = self._entries.get(response_id)
        if entry is None or not entry.ended:
            return {}
        last = max(entry.ended.values(), key=lambda one: one["arrived"] + one["wall_ns"] / 1e9)
        return {**last["parts_ns"], "total": last["wall_ns"]}

    def timing_of_first(self, response_id: str, index: int) -> list[tuple[bytes, bytes]]:
        """What is known when the first byte of a stream is sent."""
        entry = self._entries.get(response_id)
        if entry is None or index not in entry.before_first:
            return []
        return _server_timing(entry.before_first[index], ("queued", "prefill"))

    # ---- what is told -----------------------------------------------------------------------

    async def explain(self, wanted: str, tenant: str) -> dict[str, Any] | None:
        """Of an answer's id, or an x-request-id; None: there is no such request."""
        entry = self._find(wanted, tenant)
        choices = [] if entry is None else await self._records(entry)
        if entry is None or not choices:
            return None
        return {
            "id": entry.response_id,
            "object": "request.explanation",
            "request_id": entry.request_id,
            "choices": choices,
        }

    def open_choices(self, wanted: str, tenant: str | None) -> tuple[str, list[str]] | None:
        """The id of an answer of the tenant's (None: of anybody's), and what the engine calls its
        choices that have not ended; None when there is no such answer. wanted: as for `explain`."""
        entry = self._find(wanted, tenant)
        if entry is None:
            return None
        open_ = [i for i in range(entry.size) if i not in entry.ended]
        return entry.response_id, [choice_id(entry.response_id, i) for i in open_]

    def _find(self, wanted: str, tenant: str | None) -> _Entry | None:
        entry = self._entries.get(wanted)
        if entry is not None and tenant in (None, entry.tenant):
            return entry
        if tenant is not None:
            return self._by_request.get((tenant, wanted))
        of_anybody = (one for (_, name), one in self._by_request.items() if name == wanted)
        return next(of_anybody, None)

    async def _records(self, entry: _Entry) -> list[Record]:
        indices = range(entry.size)
        open_ = [choice_id(entry.response_id, i) for i in indices if i not in entry.ended]
        running = await self._engine.explain(open_) if open_ else {}
        found = ((i, running.get(choice_id(entry.response_id, i))) for i in indices)
        # What ended while we asked is no longer among those that run.
        records = ((i, entry.ended.get(i, one)) for i, one in found)
        return [{**one, "id": entry.response_id, "index": i} for i, one in records if one]


class ExplainRoutes:
    """explanations: of all models that run."""

    def __init__(self, explanations: Callable[[], Sequence[Explanations]]) -> None:
        self._explanations = explanations

    def routes(self) -> list[Route]:
        return [Route("/v1/requests/{id:path}/explain", self.explain, methods=["GET"])]

    async def explain(self, request: Request) -> Response:
        wanted, tenant = request.path_params["id"], tenant_of(request.scope)
        for one in self._explanations():
            if (found := await one.explain(wanted, tenant)) is not None:
                return reply(found)
        raise not_found(wanted)


def _server_timing(parts: Mapping[str, int], always: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """In milliseconds, as W3C's Server Timing has it; of the parts that took no time, `always`."""
    text = ", ".join(
        f"{_HEADER_NAMES.get(state, state)};dur={ns / 1e6:.3f}"
        for state, ns in parts.items()
        if ns or state in always
    )
    return [(b"server-timing", text.encode())]
