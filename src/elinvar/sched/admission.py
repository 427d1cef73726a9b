"""Admission: whether the next of those who wait starts in a step, and with what.

Whether there is room for it is sched.room's to say.
"""

from __future__ import annotations

from elinvar.base.plan import RowStart
from elinvar.kv.sequence import Allocation
from elinvar.sched.draft import Draft
from elinvar.sched.request import Request
from elinvar.sched.room import Room
from elinvar.sched.roster import Roster


class Admission:
    def __init__(self, roster: Roster, room: Room) -> None:
        self._roster, self._room, self._kv = roster, room, roster.kv

    def waits_for_another(self, draft: Draft, request: Request) -> bool:
        """Whether it is better off when somebody else has computed what they both begin with, or
        when more of it has been found or fetched. Then others may pass it, but not for long."""
        if self._kv.is_searching(request.kv):
            return self._fetches(draft, request)
        running = self._roster.running
        # It may be a batch request that computes it, which has what others leave.
        alone = not running or (not request.is_batch and any(r.is_batch for r in running))
        request.kv.waits = request.patience > 0 and not alone
        prefix = self._kv.find_prefix(request.kv, request.token_ids)
        if prefix.pending:
            return self._fetches(draft, request)
        if request.ledger.state == "fetching":
            request.ledger.enter("queued", draft.began)
        if prefix.coming is None or not request.kv.waits:
            return False
        request.patience -= 1
        self._room.put_off.append(request)
        return True

    def _fetches(self, draft: Draft, request: Request) -> bool:
        draft.num_pending += 1
        request.ledger.enter("fetching", draft.began)
        return True

    def admit(self, draft: Draft, request: Request, budget: int) -> int | None:
        """Start a request, if need be in the place of some that give way to it. Returns what is left
        of the budget; None: it must wait."""
        roster, kv = self._roster, self._kv
        kept = len(self._room.put_off)
        if budget > 0 and 0 < roster.num_free <= kept:
            draft.awaited = "rows"
            return None
        while True:
            if budget > 0 and roster.num_free > kept:
                prefix = kv.find_prefix(request.kv, request.token_ids)
                if not roster.running or self._room.fits(request, prefix, roster.running):
                    break
            victim = self._room.gives_way(request, roster.running)
            if victim is None:
                short = "memory" if budget > 0 else "budget"
                draft.awaited = short if roster.num_free else "rows"
                return None
            draft.send_away(victim, "yield")
            budget += 1
        start = prefix.num_tokens
        # What is loaded takes steps; how much is computed behind it is decided when it is there.
        most = 1 if prefix.is_below else budget
        end = min(request.reach, start + most)
        allocation = kv.prepare(request.kv, start, end, prefix)
        assert allocation is not None
        if self._start(draft, request, allocation):
            return budget - (allocation.end - start)
        if draft.load(request):
            budget -= draft.go_on(request, budget - 1)
        return budget - 1

    def _start(self, draft: Draft, request: Request, allocation: Allocation) -> bool:
        """Whether it begins at once; False: its cached prefix is yet to be loaded."""
        prefix, plan = allocation.prefix, draft.plan
        assert prefix is not None
        taken = self._kv.apply(allocation)
        plan.copies += taken.copies
        self._roster.start(request)
        request.num_computed_tokens = prefix.num_tokens
        if request.first_scheduled is None:
            request.first_scheduled = draft.began
            request.num_cached_tokens = prefix.num_tokens
            for tier, count in self._kv.where_found(request.kv, prefix, taken).items():
                request.ledger.found(tier, count)
        # A copy: the plan is plain data, and the request's list grows.
        tokens = list(request.token_ids)
        plan.started.append(
            RowStart(
                request.id,
                request.row,
                tokens,
                request.params,
                taken.start,
                request.adapter,
                request.num_prompt_tokens,
                request.stop_ids,
                request.namespace,
            )
        )
        if taken.loads:
            for table, blocks in zip(taken.start, taken.blocks, strict=True):
                table += blocks
            request.loads, request.is_loading = taken.loads, True
            return False
        request.ledger.enter("prefill", draft.began)
        draft.append(request, allocation.end, taken.blocks)
        return True
