"""Draft: a plan that is being made, and whom it takes blocks from.

The rules by which somebody must go are sched.room's.
"""

from __future__ import annotations

from elinvar.base.plan import PlanItem, StepPlan, Wave
from elinvar.kv.sequence import Allocation
from elinvar.sched.loading import Loading
from elinvar.sched.request import Request
from elinvar.sched.room import Room
from elinvar.sched.roster import Roster
from elinvar.sched.wave import Underway


class Draft:
    """Of the plan that begins at `began`, by the roster's clock."""

    def __init__(self, roster: Roster, room: Room, loading: Loading, began: float) -> None:
        self.roster, self.began = roster, began
        self.plan = StepPlan()
        self.num_decodes = 0
        """Leading items that are no chunks of prompts."""
        self.sent_away: list[Request] = []
        self.short = False
        """Somebody was sent away for want of blocks."""
        self.awaited = "step"
        """What those wait for who cannot start, as their ledgers have it."""
        self.num_pending = 0
        """Of those that wait: for whom more may yet be found or fetched."""
        self.no_blocks: list[list[int]] = [[] for _ in roster.kv.pools]
        """New ones of each group, where there are none."""
        self._room, self._loading = room, loading

    def append(self, request: Request, end: int, new_blocks: list[list[int]]) -> None:
        """It computes what it knows up to `end`."""
        start = request.num_computed_tokens
        samples = end == request.num_tokens
        self.plan.items.append(
            PlanItem(request.id, request.row, start, end - start, samples, new_blocks)
        )
        self.roster.planned.append(request)

    def go_on(self, request: Request, budget: int) -> int:
        """It computes the token that it is at and, as far as there are blocks, so many more; how
        many more. Where there is no block it stands still."""
        end = min(request.reach, request.num_computed_tokens + 1 + budget)
        new_blocks = self.no_blocks
        if end > request.kv.capacity:
            allocation = self._make_room(request, end)
            if allocation is None:
                return 0
            end = allocation.end
            new_blocks = self.roster.kv.apply(allocation).blocks
        self.append(request, end, new_blocks)
        return end - request.num_computed_tokens - 1

    def leave_room(self, most: int) -> None:
        """For so many drafts behind each item, all of which decode, as far as blocks are free beyond
        those that somebody may need in the next step: nobody has to go for a guess. Nothing is drafted
        behind a prompt of which the answer is to see a part that is not chosen yet."""
        kv, running = self.roster.kv, len(self.roster.running)
        for item, request in zip(self.plan.items, self.roster.planned, strict=True):
            if request.reads_all:
                continue
            end = min(request.num_tokens + most, request.max_total_tokens - 1)
            if end > request.kv.capacity and kv.num_free > running:
                allocation = kv.prepare(request.kv, item.start, end)
                if allocation is not None:
                    taken = kv.apply(allocation).blocks
                    pairs = zip(item.new_blocks, taken, strict=True)
                    item.new_blocks = [before + new for before, new in pairs]
            item.num_drafts = max(0, min(end, request.kv.capacity) - request.num_tokens)

    def load(self, request: Request) -> bool:
        """Copy some of its cached prefix; whether the row can go on in this step."""
        done = self._loading.go_on(self.plan, request)
        request.ledger.enter("prefill" if done else "loading", self.began)
        return done

    def _make_room(self, request: Request, end: int) -> Allocation | None:
        """Preempt those who come after `request` until it can go on. None when nobody can be: it
        stands still for a step, and keeps what it has until others need it."""
        kv, start = self.roster.kv, request.num_computed_tokens
        while (allocation := kv.prepare(request.kv, start, end)) is None:
            victim = self._room.goes_for(request, self.roster.running)
            if victim is None:
                return None
            self.send_away(victim, "memory")
            self.short = True
        return allocation

    def send_away(self, request: Request, cause: str) -> None:
        """Preempt a request, which may be a part of the plan already."""
        plan, planned = self.plan, self.roster.planned
        if request in planned:
            index = planned.index(request)
            del planned[index], plan.items[index]
            self.num_decodes -= index < self.num_decodes
        if any(one.request_id == request.id for one in plan.started):
            # What this plan copies for it is not there yet, and may be lost with it.
            request.is_loading = True
        self._loading.send_away(plan, request)
        self.roster.preempt(request, cause)
        self.sent_away.append(request)

    @property
    def prompts(self) -> list[PlanItem]:
        """The items that are chunks of prompts."""
        return self.plan.items[self.num_decodes :]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(item.num_tokens for item in self.prompts)

    def begin_wave(self) -> None:
        """Those go through the layers by and by."""
        planned, at = self.roster.planned, self.num_decodes
        self.roster.begin_wave(Underway(planned[at:], self.prompts))
        del planned[at:], self.plan.items[at:]

    def take_wave_to(self, end: int, num_layers: int) -> None:
        """This step takes the wave through the layers before `end`."""
        wave = self.roster.wave
        assert wave is not None
        self.plan.wave = Wave(wave.items, wave.num_done, end, end == num_layers)
        self.roster.planned += wave.requests

    def end_jam(self, max_step_tokens: int) -> None:
        """Each needs a block, and those who could be preempted made no progress since they were: the
        first goes on whatever it takes. The door saw to it that one alone always has room."""
        running = self.roster.running
        first = running[0]
        assert not first.loads
        start = first.num_computed_tokens
        while self.roster.kv.prepare(first.kv, start, start + 1) is None:
            assert running[-1] is not first
            self.send_away(running[-1], "jam")
        self.go_on(first, max_step_tokens - len(running))
