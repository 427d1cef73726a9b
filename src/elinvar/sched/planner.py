"""Planner: who computes how much in the next step.

Every running request that samples gets its token; what is left of the budget goes to prompts in the
policy's order, and who may start is sched.admission's. The rules and their reasons are in
docs/design/002-scheduler-and-kv.md and docs/design/022-who-goes-first.md.
"""

from __future__ import annotations

from elinvar.base.plan import PlanItem
from elinvar.sched.admission import Admission
from elinvar.sched.chunks import Chunks
from elinvar.sched.draft import Draft
from elinvar.sched.loading import Loading
from elinvar.sched.request import Request
from elinvar.sched.room import Room
from elinvar.sched.roster import Roster

MOST_PUT_OFF = 32
"""Requests that may be passed in a step, since each of them is looked at."""


class Planner:
    """max_step_tokens: token budget of a step. max_drafts: room for drafts that a row gets."""

    def __init__(
        self,
        roster: Roster,
        room: Room,
        loading: Loading,
        chunks: Chunks,
        max_step_tokens: int,
        max_drafts: int = 0,
    ) -> None:
        self._roster, self._room, self._loading, self._chunks = roster, room, loading, chunks
        self._max_step_tokens, self._max_drafts = max_step_tokens, max_drafts
        self._admission = Admission(roster, room)
        # A wave that is given up leaves states of some layers behind their chunk, and others before it:
        # whoever else was in it could not begin it again.
        self._one_in_wave = roster.kv.has_states

    def draft(self) -> Draft:
        """The next plan, but for what is saved."""
        roster, tenants = self._roster, self._roster.tenants
        draft = Draft(roster, self._room, self._loading, roster.clock())
        self._loading.begin()
        wave = roster.wave
        prompts = self._decodes(draft)
        draft.num_decodes = len(draft.plan.items)
        if roster.wave is not None:
            self._go_on(draft)
        elif wave is not None:  # somebody in it had to go
            prompts += [request for request in wave.requests if request.row >= 0]
        if roster.wave is None and (prompts or tenants.num_waiting):
            self._prompts(draft, prompts)
        if tenants.num_waiting:
            tenants.wait_for(draft.awaited, draft.began)
        if roster.running and draft.plan.is_empty:
            draft.end_jam(self._max_step_tokens)
        if self._max_drafts:
            self._leave_room(draft)
        return draft

    def _leave_room(self, draft: Draft) -> None:
        """For drafts, in steps of decode alone: beside prompts the machine is busy."""
        plan, rows = draft.plan, len(draft.plan.items)
        alone = plan.wave is None and rows == draft.num_decodes and not plan.loads
        if rows and alone and self._chunks.knows_quiet(rows):
            draft.leave_room(min(self._max_drafts, self._max_step_tokens // rows - 1))

    def _decodes(self, draft: Draft) -> list[Request]:
        """Plan all that have one token to compute; returns those amid their prompts.

        Nobody goes away empty-handed but for want of a block: rows are admitted only while budget is
        left, so there are never more of them than tokens.
        """
        items, planned = draft.plan.items, self._roster.planned
        no_blocks = draft.no_blocks
        prompts = []
        for request in self._roster.running.copy():
            if request.row < 0 or request.in_wave:  # preempted a moment ago, or busy
                continue
            if request.loads and not draft.load(request):
                continue
            start = request.num_computed_tokens
            known = len(request.token_ids)
            if known - start > 1:
                prompts.append(request)
            elif known > request.kv.capacity:
                draft.go_on(request, 0)
            else:
                items.append(PlanItem(request.id, request.row, start, 1, True, no_blocks))
                planned.append(request)
        return prompts

    def _prompts(self, draft: Draft, prompts: list[Request]) -> None:
        """Give what is left of the budget to those amid their prompts, who are sure of a token
        each, and to those who wait, all in the policy's order. No newcomer overtakes another."""
        tenants, planned, now = self._roster.tenants, self._roster.planned, draft.began
        rank = tenants.rank
        budget = self._max_step_tokens - len(self._roster.running)
        amid = sorted(((rank(request), request) for request in prompts), reverse=True)
        limit = self._limit(draft, amid[-1][1].num_computed_tokens if amid else 0)
        if limit == 0:
            draft.awaited = "budget"
            return
        if limit is not None:
            budget = min(budget, max(0, self._chunks.in_wave(limit) - len(amid)))
        admitting, alone = True, not planned
        put_off: list[Request] = []
        self._room.put_off.clear()
        while True:
            if alone and planned and draft.plan.items[-1].sample:
                alone = False
                depth = amid[-1][1].num_computed_tokens if amid else 0
                beside = None if planned[-1].is_batch else self._chunks.beside_first(depth)
                budget = budget if beside is None else min(budget, beside)
            if limit is not None and self._one_in_wave and draft.num_prompt_tokens:
                budget = min(budget, int(limit) - draft.num_prompt_tokens)
                if budget <= 0:
                    break
            head = tenants.head(now, put_off) if admitting else None
            # Whoever was just preempted may be next already, and its blocks still be cached: not
            # back in the same step, or the two would take turns.
            if draft.short or head in draft.sent_away:
                head, draft.awaited = None, "memory"
            if amid and (head is None or amid[-1][0] < rank(head)):
                request = amid.pop()[1]
                if request.row >= 0:
                    budget -= draft.go_on(request, budget)
            elif head is not None and self._admission.waits_for_another(draft, head):
                put_off.append(head)
                admitting = len(put_off) < MOST_PUT_OFF
                head.ledger.wait("prefix", now)
            elif head is not None:
                head.ledger.wait("", now)
                left = self._admission.admit(draft, head, budget)
                admitting = left is not None
                budget = budget if left is None else left
            else:
                break
        if limit is not None:
            self._begin_wave(draft, limit)

    def _limit(self, draft: Draft, depth: float) -> float | None:
        """As Chunks.limit, of the rows that are planned."""
        planned = self._roster.planned
        if not planned:
            return None
        # Interactive ones stand before batch ones among the running.
        first, last = planned[0].is_batch, planned[-1].is_batch
        return self._chunks.limit(len(planned), not first, last, depth)

    # ---- waves ------------------------------------------------------------------------------

    def _begin_wave(self, draft: Draft, limit: float) -> None:
        """Where what was planned of prompts takes longer than a step may, it goes by layers."""
        fits = draft.num_prompt_tokens <= limit or self._chunks.num_layers == 1
        if not fits and not (self._one_in_wave and len(draft.prompts) > 1):
            draft.begin_wave()
            self._chunks.new_wave()
            self._take(draft, limit)

    def _go_on(self, draft: Draft) -> None:
        """Nothing new begins before the wave has ended, but what is looked for below is."""
        wave = self._roster.wave
        assert wave is not None
        limit = self._limit(draft, wave.depth)
        if limit != 0:
            self._take(draft, limit)
        draft.awaited = "budget"
        put_off: list[Request] = []
        self._room.put_off.clear()
        while len(put_off) < MOST_PUT_OFF:
            head = self._roster.tenants.head(draft.began, put_off)
            if head is None or not self._admission.waits_for_another(draft, head):
                return
            put_off.append(head)
            head.ledger.wait("prefix", draft.began)

    def _take(self, draft: Draft, limit: float | None) -> None:
        wave = self._roster.wave
        assert wave is not None
        end = self._chunks.reach(limit, wave.num_tokens, wave.num_done)
        draft.take_wave_to(end, self._chunks.num_layers)
