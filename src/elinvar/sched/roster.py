"""Roster: the requests that are here, who runs and in which row.

Owns what happens to a request when it comes, runs, is sent back to wait, and ends; the queue is
sched.tenants', blocks are the KVManager's. It decides nothing.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from elinvar.kv.manager import KVManager
from elinvar.kv.sessions import Sessions
from elinvar.kv.tree import Node
from elinvar.sched.request import FinishReason, Request, Status
from elinvar.sched.tenants import Tenants, by_key
from elinvar.sched.wave import Underway


class Roster:
    """max_rows: requests running at once."""

    def __init__(
        self,
        kv: KVManager,
        tenants: Tenants,
        sessions: Sessions,
        max_rows: int,
        clock: Callable[[], float],
    ) -> None:
        self.kv, self.tenants, self.sessions, self.clock = kv, tenants, sessions, clock
        self.max_rows = max_rows
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        """In the order of their keys, whatever was preempted in between."""
        self.planned: list[Request] = []
        """Whom the plan that is made, or waits for its commit, touches: in the order of its items, then
        its wave's. By object, not by id: an id may come back as another request before the commit."""
        self.is_ahead = False
        """That plan is: what was computed before it is known, since it writes behind that."""
        self.changes = 0
        """How often somebody came, or gave something back."""
        self.wave: Underway | None = None
        """Chunks that were begun in an earlier step, or are in the plan."""
        self.preemptions = {"memory": 0, "jam": 0, "yield": 0, "failure": 0, "asked": 0}
        """By cause: for blocks that another needed, that each needed, for one that goes first,
        because a step was lost, by hand."""
        self._num_added = 0
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._released: list[int] = []

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return len(self._free_rows)

    def add(self, request: Request) -> None:
        """It waits from now on."""
        self.changes += 1
        request.order = self._num_added
        self._num_added += 1
        self.requests[request.id] = request
        self.tenants.push(request)
        request.session = self.sessions.begin(request.handling)

    def start(self, request: Request) -> None:
        """It waits no longer, and has a row."""
        self.tenants.remove(request)
        request.account.num_running += 1
        request.status = Status.RUNNING
        request.row = self._free_rows.pop()
        insort(self.running, request, key=by_key)

    def preempt(self, request: Request, cause: str) -> None:
        """Take row and blocks; it waits in its old place."""
        reached = 0 if request.is_loading else request.num_computed_tokens
        self._release(request)
        request.ledger.enter("preempted", self.clock(), cause)
        request.status = Status.WAITING
        request.num_reached_tokens = max(request.num_reached_tokens, reached)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.preemptions[cause] += 1
        self.tenants.push(request)

    def finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """It ends, and holds nothing any more."""
        path: list[Node] = []
        if request.status is Status.RUNNING:
            path = self._release(request)
        else:
            self.tenants.remove(request)
            self.kv.end_lookup(request.kv)
        if request.session is not None:
            ran = request.first_scheduled is not None
            cached = request.num_cached_tokens if ran else None
            self.sessions.end(request.session, path, request.num_prompt_tokens, cached)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.finished = now
        request.ledger.end(now)
        del self.requests[request.id]
        self.tenants.gone(request)

    def fall_over(self, request: Request) -> None:
        """What it was to begin with did not come: it is computed."""
        if request.status is not Status.RUNNING:
            return
        if not request.ledger.steps:
            request.num_cached_tokens, request.first_scheduled = 0, None
            request.ledger.cached.clear()
        self.preempt(request, "failure")
        self.kv.give_up_lookup(request.kv)

    def _release(self, request: Request) -> list[Node]:
        """Take its row and its blocks; what can be found of them."""
        self.changes += 1
        self.running.remove(request)
        request.account.num_running -= 1
        # What a step that was not committed wrote is unknown, and so is what a wave did.
        planned = not self.is_ahead and request in self.planned
        unknown = planned or request.is_loading or request.in_wave
        if request.in_wave:
            self.end_wave()
        computed = 0 if unknown else request.num_computed_tokens
        request.loads, request.is_loading = [], False
        path = self.kv.free(request.kv, request.token_ids, computed)
        self._free_rows.append(request.row)
        self._released.append(request.row)
        request.row = -1
        return path

    def begin_wave(self, wave: Underway) -> None:
        self.wave = wave
        for request in wave.requests:
            request.in_wave = True

    def end_wave(self) -> None:
        """It came to its end, or one of its requests leaves: no layer may write into blocks that were
        given back, so the others' chunks are begun again. They are no further than before."""
        assert self.wave is not None
        for request in self.wave.requests:
            request.in_wave = False
        self.wave = None

    def take_released(self) -> list[int]:
        """Rows that were released since the last call."""
        rows, self._released = self._released, []
        return rows

    def give_back(self, rows: list[int]) -> None:
        """What was taken of them did not arrive."""
        self._released = list(dict.fromkeys(rows + self._released))

    def check(self) -> None:
        """Assert all invariants."""
        running, waiting = self.running, list(self.tenants)
        assert running == sorted(running, key=by_key)
        assert {r.id for r in running + waiting} == set(self.requests)
        here = len(running) + self.tenants.num_waiting
        assert len(running) + len(waiting) == len(self.requests) == here
        rows = [r.row for r in running] + self._free_rows
        assert sorted(rows) == list(range(self.max_rows)), "a row is lost or used twice"
        for request in running:
            assert request.status is Status.RUNNING
            assert request.num_computed_tokens < request.num_tokens < request.max_total_tokens
            assert request.num_computed_tokens <= request.kv.capacity
            lookup = request.kv.lookup
            assert request.is_loading or not (lookup and lookup.ticket), "pinned for nobody"
        carried = self.wave.requests if self.wave is not None else []
        assert [r for r in self.requests.values() if r.in_wave and r not in carried] == []
        assert all(request.in_wave and request in running for request in carried)
        for request in waiting:
            assert request.status is Status.WAITING
            assert request.row == -1 and request.num_computed_tokens == 0
            assert request.kv.capacity == 0
        self.tenants.check(running)
        self.kv.check(request.kv for request in running)
        self.sessions.check()
