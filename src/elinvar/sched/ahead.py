"""Ahead: the plan behind one that waits for its commit, so that a device need not wait for the host.

It is made where nothing is to be decided: each row has sampled, and goes on by that token, whatever it
is. A row that turns out to have ended was computed in vain, which nobody sees: what it wrote lies behind
its last token. All else is decided by whole plans (sched.planner), with all tokens known.
"""

from __future__ import annotations

from elinvar.base.plan import PlanItem, StepPlan
from elinvar.sched.request import Request, Status
from elinvar.sched.roster import Roster

LOOK = 8
"""Plans ahead in a row while somebody waits: rates and ranks change by time alone."""


class Ahead:
    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._seen = -1
        """The roster's changes when a whole plan was last made."""
        self._num_pending = self._num_since = 0
        self._no_blocks: list[list[int]] = [[] for _ in roster.kv.pools]

    def look(self, num_pending: int) -> None:
        """A whole plan was made. num_pending: as Draft has it."""
        self._seen, self._num_pending, self._num_since = self._roster.changes, num_pending, 0

    def draft(self, plan: StepPlan) -> tuple[StepPlan, list[Request]] | None:
        """What follows `plan`, whom the roster has as planned, and whom that touches. None where one of
        these must first know its token, needs a block that is not free, or leaves its turn to others."""
        roster, kv = self._roster, self._roster.kv
        # States of rows that ended would be those behind their last tokens.
        if plan.wave or roster.wave or plan.loads or kv.has_states or self._is_due:
            return None
        going: list[tuple[int, Request]] = []
        num_running = num_needed = 0
        for item, request in zip(plan.items, roster.planned, strict=True):
            if request.status is not Status.RUNNING:
                continue
            if not item.sample:
                return None
            num_running += 1
            at = item.start + item.num_tokens
            if at + 1 < request.max_total_tokens:
                going.append((at, request))
                num_needed += at >= request.kv.capacity
        if not going or num_running < len(roster.running) or num_needed > kv.num_free:
            return None
        self._num_since += 1
        items = [self._item(at, request) for at, request in going]
        return StepPlan(items=items, is_ahead=True), [request for _, request in going]

    @property
    def _is_due(self) -> bool:
        """Somebody waits who might have a turn in a whole plan."""
        roster = self._roster
        changed = roster.changes != self._seen or self._num_pending or self._num_since >= LOOK
        return bool(roster.tenants.num_waiting and changed)

    def _item(self, at: int, request: Request) -> PlanItem:
        """The token at `at`, which is not known yet."""
        kv, new_blocks = self._roster.kv, self._no_blocks
        if at >= request.kv.capacity:
            allocation = kv.prepare(request.kv, at, at + 1)
            assert allocation is not None
            new_blocks = kv.apply(allocation).blocks
        return PlanItem(request.id, request.row, at, 1, True, new_blocks)
