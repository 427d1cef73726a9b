"""Scheduler: plans which tokens each request computes in the next step, and books the result.

Owns the rows and the budget of a step; the queue is sched.tenants', its order the policy's, who must
go is sched.room's, blocks are the KVManager's. It runs no model and reads no text. Not thread-safe:
one thread calls it. The rules and their reasons are in docs/design/002-scheduler-and-kv.md and
docs/design/022-who-goes-first.md.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from elinvar.base.config import KVSpec
from elinvar.base.errors import InputError
from elinvar.base.limits import Target, TenantLimits
from elinvar.base.plan import PlanItem, RowStart, StepOutput, StepPlan
from elinvar.kv.manager import KVManager
from elinvar.kv.sequence import Allocation
from elinvar.kv.sessions import Sessions
from elinvar.kv.tree import Node
from elinvar.sched.chunks import Chunks
from elinvar.sched.door import max_total_tokens
from elinvar.sched.ledger import Ledger
from elinvar.sched.loading import Loading
from elinvar.sched.policy import Fair, FirstCome, Policy
from elinvar.sched.request import FinishReason, Request, RequestUpdate, Status
from elinvar.sched.room import Room
from elinvar.sched.tenants import Tenants, by_key

UNLIMITED = Target(ttft_s=1.0, itl_s=None)


if TYPE_CHECKING:
    from elinvar.kv.tiers.hierarchy import Tiers

MOST_PUT_OFF = 32
"""Requests that may be passed in a step, since each of them is looked at."""
LOOK_AGAIN_S = 0.001
"""Where all wait for what is being fetched."""


class Scheduler:
    """Continuous batching with chunked prefill under one token budget.

    specs, num_blocks: the KV groups and the size of each pool, in blocks.
    max_rows: requests running at once. max_step_tokens: token budget of a step.
    max_context: longest sequence, prompt and answer. eos_ids: the model's end tokens.
    namespace: what cached blocks depend on besides tokens (the weights' version).
    policy: who goes first. tenants: limits by name, as EngineConfig.tenants.
    interactive, batch: how long steps may take while requests of that class are answered.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        num_blocks: Sequence[int],
        max_rows: int,
        max_step_tokens: int,
        max_context: int,
        eos_ids: frozenset[int],
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
        namespace: str = "",
        policy: Policy | None = None,
        tenants: Mapping[str, TenantLimits] | None = None,
        interactive: Target = UNLIMITED,
        batch: Target = UNLIMITED,
    ) -> None:
        self.kv = KVManager(specs, num_blocks, prefix_cache, namespace)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.max_context = max_context
        self.eos_ids = eos_ids
        self.policy = policy or FirstCome()
        self.tenants = Tenants(tenants or {}, self.policy.turn, isinstance(self.policy, Fair))
        self.sessions = Sessions(self.kv, clock, tenants or {})
        self.chunks = Chunks(interactive, batch)
        self.preemptions = {"memory": 0, "jam": 0, "yield": 0, "failure": 0, "asked": 0}
        """By cause: for blocks that another needed, that each needed, for one that goes first,
        because a step was lost, by hand."""
        self._room = Room(self.kv, self.policy, self.tenants, max_step_tokens, specs[0].block_size)
        self._clock = clock
        self._requests: dict[str, Request] = {}
        # In the order of their keys, whatever was preempted in between.
        self._running: list[Request] = []
        self._num_added = 0
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._released: list[int] = []
        # The plan that waits for its commit, and its items' requests. By object, not by id: an id
        # may come back as another request before the commit.
        self._plan = StepPlan()
        self._loading = Loading(specs)
        self._planned: list[Request] = []
        self._began = 0.0
        self._num_decodes = 0
        self._no_blocks: list[list[int]] = [[] for _ in specs]
        # Of the plan that is being made: who was preempted, and whether for want of blocks.
        self._sent_away: list[Request] = []
        self._short = False
        self._num_pending = 0
        """Of those that wait: for whom more may yet be found or fetched."""
        self._awaited = "step"
        """And what those wait for who could not start, as their ledgers have it."""

    def use_tiers(self, tiers: Tiers) -> None:
        """Cached contents go on below the provider's memory, and come back from there."""
        self.kv.use_tiers(tiers, self.chunks.span_s)

    # ---- requests come and go ---------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. InputError when it could never run, even alone on an idle engine;
        QueueFullError when its tenant has as many waiting as it may."""
        request.max_total_tokens = max_total_tokens(
            request.num_prompt_tokens,
            request.params.max_tokens,
            self.max_context,
            self.kv.longest(request.params.kept_blocks),
        )
        if request.id in self._requests:
            raise InputError("request_id", f"Request id {request.id!r} is in use: choose another.")
        now = self._clock()
        self.tenants.open(request, now)
        self.tenants.check_room(request, self._running, self.max_rows, self.chunks.speed, now)
        stop_ids = frozenset(request.params.stop_token_ids)
        request.stop_ids = stop_ids if request.params.ignore_eos else stop_ids | self.eos_ids
        request.kv = self.kv.new_sequence(request.namespace, request.params.kept_blocks)
        request.order = self._num_added
        request.arrival = request.arrival or now
        request.ledger = Ledger(request.account.waits, request.arrival, now)
        request.place = self.policy.place(request, self.chunks.prompt_s(request.num_prompt_tokens))
        self._num_added += 1
        self._requests[request.id] = request
        self.tenants.push(request)
        request.session = self.sessions.begin(request.handling)

    def abort(self, request_id: str) -> bool:
        """Cancel a request at any moment, also between plan and commit; its blocks are free at
        once. False when there is none of this id (it may just have finished)."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason = "stop") -> bool:
        """End a request from outside, for example because a stop text appeared."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, reason, self._clock())
        return True

    def preempt(self, request_id: str) -> None:
        """Take row and blocks from a running request; it waits, in its old place, to be computed
        again. Its tokens stay, so no result changes."""
        request = self._requests.get(request_id)
        if request is not None and request.status is Status.RUNNING:
            self._preempt(request, "asked")

    def _preempt(self, request: Request, cause: str) -> None:
        reached = 0 if request.is_loading else request.num_computed_tokens
        self._release(request)
        request.ledger.enter("preempted", self._clock(), cause)
        request.status = Status.WAITING
        request.num_reached_tokens = max(request.num_reached_tokens, reached)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.preemptions[cause] += 1
        self.tenants.push(request)

    def _finish(self, request: Request, reason: FinishReason, now: float) -> None:
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
        del self._requests[request.id]
        self.tenants.gone(request)

    def _release(self, request: Request) -> list[Node]:
        """Take its row and its blocks; what can be found of them."""
        self._running.remove(request)
        request.account.num_running -= 1
        # What a step that was not committed wrote is unknown.
        unknown = request in self._planned or request.is_loading
        computed = 0 if unknown else request.num_computed_tokens
        request.loads, request.is_loading = [], False
        path = self.kv.free(request.kv, request.token_ids, computed)
        self._free_rows.append(request.row)
        self._released.append(request.row)
        request.row = -1
        return path

    # ---- plan -------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step. The runner applies released_rows, then started, then items: a row may
        be released and started in one plan. After a plan that was never committed a row may be
        released twice, or without having been started.

        When nobody can go on the plan is empty, and needs neither execute nor commit: see idle_s.
        """
        self._drop_uncommitted()
        self._plan = plan = StepPlan()
        self._sent_away, self._short, self._num_decodes = [], False, 0
        self._awaited, self._num_pending = "step", 0
        self._began = now = self._clock()
        self._loading.begin()
        prompts = self._plan_decodes(plan)
        self._num_decodes = len(plan.items)
        if prompts or self.tenants.num_waiting:
            self._plan_prompts(plan, prompts, now)
            self.tenants.wait_for(self._awaited, now)
        if self._running and plan.is_empty:
            self._end_jam(plan)
        # Also where somebody waits for what is fetched: the blocks that it will take can be given up.
        plan.saves = self.kv.saves(bool(self._num_pending) or (plan.is_empty and not self._running))
        if not plan.is_empty:
            plan.released_rows, self._released = self._released, []
        return plan

    def _drop_uncommitted(self) -> None:
        """The last plan was never committed (the runner failed, or Ctrl-C came in between): what
        was written is unknown, so its requests are computed again."""
        for request in self._loading.dropped():
            self._fall_over(request)
        for request in self._planned:
            if request.status is Status.RUNNING:
                self._preempt(request, "failure")
        self._released = list(dict.fromkeys(self._plan.released_rows + self._released))
        self._planned = []

    def _plan_decodes(self, plan: StepPlan) -> list[Request]:
        """Plan all that have one token to compute; returns those amid their prompts.

        Nobody goes away empty-handed but for want of a block: rows are admitted only while budget is
        left, so there are never more of them than tokens.
        """
        items, planned, no_blocks = plan.items, self._planned, self._no_blocks
        prompts = []
        for request in self._running.copy():
            if request.row < 0:  # preempted a moment ago
                continue
            if request.loads and not self._load(plan, request):
                continue
            start = request.num_computed_tokens
            known = len(request.token_ids)
            if known - start > 1:
                prompts.append(request)
                continue
            new_blocks = no_blocks
            if known > request.kv.capacity:
                allocation = self._make_room(plan, request, start, known)
                if allocation is None:
                    continue
                new_blocks = self.kv.apply(allocation).blocks
            items.append(PlanItem(request.id, request.row, start, 1, True, new_blocks))
            planned.append(request)
        return prompts

    def _plan_prompts(self, plan: StepPlan, prompts: list[Request], now: float) -> None:
        """Give what is left of the budget to those amid their prompts, who are sure of a token
        each, and to those who wait, all in the policy's order. No newcomer overtakes another."""
        rank = self.tenants.rank
        budget = self.max_step_tokens - len(self._running)
        amid = sorted(((rank(request), request) for request in prompts), reverse=True)
        if self._planned:
            # Interactive ones stand before batch ones among the running.
            depth = amid[-1][1].num_computed_tokens if amid else 0
            first, last = self._planned[0].is_batch, self._planned[-1].is_batch
            limit = self.chunks.limit(len(self._planned), not first, last, depth)
            if limit == 0:
                self._awaited = "budget"
                return
            if limit is not None:
                budget = min(budget, max(0, limit - len(amid)))
        admitting, alone = True, not self._planned
        put_off: list[Request] = []
        self._room.put_off.clear()
        while True:
            if alone and self._planned and plan.items[-1].sample:
                alone = False
                depth = amid[-1][1].num_computed_tokens if amid else 0
                beside = None if self._planned[-1].is_batch else self.chunks.beside_first(depth)
                budget = budget if beside is None else min(budget, beside)
            head = self.tenants.head(now, put_off) if admitting else None
            # Whoever was just preempted may be next already, and its blocks still be cached: not
            # back in the same step, or the two would take turns.
            if self._short or head in self._sent_away:
                head, self._awaited = None, "memory"
            if amid and (head is None or amid[-1][0] < rank(head)):
                request = amid.pop()[1]
                if request.row >= 0:
                    budget -= self._go_on(plan, request, budget)
            elif head is not None and self._waits_for_another(head):
                put_off.append(head)
                admitting = len(put_off) < MOST_PUT_OFF
                head.ledger.wait("prefix", now)
            elif head is not None:
                head.ledger.wait("", now)
                left = self._admit(plan, head, budget, now)
                admitting = left is not None
                budget = budget if left is None else left
            else:
                return

    def _go_on(self, plan: StepPlan, request: Request, budget: int) -> int:
        """Plan the next chunk of a prompt; returns how much of the budget it took."""
        start, known = request.num_computed_tokens, request.num_tokens
        end = min(known, start + 1 + budget)
        new_blocks = self._no_blocks
        if end > request.kv.capacity:
            allocation = self._make_room(plan, request, start, end)
            if allocation is None:
                return 0
            end = allocation.end
            new_blocks = self.kv.apply(allocation).blocks
        plan.items.append(
            PlanItem(request.id, request.row, start, end - start, end == known, new_blocks)
        )
        self._planned.append(request)
        return end - start - 1

    # ---- who must go ------------------------------------------------------------------------

    def _make_room(
        self, plan: StepPlan, request: Request, start: int, end: int
    ) -> Allocation | None:
        """Preempt those who come after `request` until it can go on. None when nobody can be: it
        stands still for a step, and keeps what it has until others need it."""
        while (allocation := self.kv.prepare(request.kv, start, end)) is None:
            victim = self._room.goes_for(request, self._running)
            if victim is None:
                return None
            self._send_away(plan, victim, "memory")
            self._short = True
        return allocation

    def _send_away(self, plan: StepPlan, request: Request, cause: str) -> None:
        """Preempt while a plan is made, of which the request may be a part already."""
        if request in self._planned:
            index = self._planned.index(request)
            del self._planned[index], plan.items[index]
            self._num_decodes -= index < self._num_decodes
        if any(one.request_id == request.id for one in plan.started):
            # What this plan copies for it is not there yet, and may be lost with it.
            request.is_loading = True
        self._loading.send_away(plan, request)
        self._preempt(request, cause)
        self._sent_away.append(request)

    def _end_jam(self, plan: StepPlan) -> None:
        """Each needs a block, and those who could be preempted made no progress since they were: the
        first goes on whatever it takes. The door saw to it that one alone always has room."""
        first = self._running[0]
        assert not first.loads
        start = first.num_computed_tokens
        while self.kv.prepare(first.kv, start, start + 1) is None:
            assert self._running[-1] is not first
            self._send_away(plan, self._running[-1], "jam")
        self._go_on(plan, first, self.max_step_tokens - len(self._running))

    # ---- who may start ----------------------------------------------------------------------

    def _waits_for_another(self, request: Request) -> bool:
        """Whether it is better off when somebody else has computed what they both begin with, or
        when more of it has been found or fetched. Then others may pass it, but not for long."""
        if self.kv.is_searching(request.kv):
            return self._fetches(request)
        prefix = self.kv.find_prefix(request.kv, request.token_ids)
        if prefix.pending:
            return self._fetches(request)
        if request.ledger.state == "fetching":
            request.ledger.enter("queued", self._began)
        waits = prefix.coming is not None and request.patience > 0 and bool(self._running)
        # It may be a batch request that computes it, which has what others leave.
        waits = waits and (request.is_batch or not any(r.is_batch for r in self._running))
        if waits:
            request.patience -= 1
            self._room.put_off.append(request)
        return waits

    def _fetches(self, request: Request) -> bool:
        self._num_pending += 1
        request.ledger.enter("fetching", self._began)
        return True

    def _admit(self, plan: StepPlan, request: Request, budget: int, now: float) -> int | None:
        """Start a request, if need be in the place of some that give way to it. Returns what is left
        of the budget; None: it must wait."""
        kept = len(self._room.put_off)
        if budget > 0 and 0 < len(self._free_rows) <= kept:
            self._awaited = "rows"
            return None
        while True:
            if budget > 0 and len(self._free_rows) > kept:
                prefix = self.kv.find_prefix(request.kv, request.token_ids)
                if not self._running or self._room.fits(request, prefix, self._running):
                    break
            victim = self._room.gives_way(request, self._running)
            if victim is None:
                short = "memory" if budget > 0 else "budget"
                self._awaited = short if self._free_rows else "rows"
                return None
            self._send_away(plan, victim, "yield")
            budget += 1
        start = prefix.num_tokens
        # What is loaded takes steps; how much is computed behind it is decided when it is there.
        most = 1 if prefix.is_below else budget
        end = min(request.num_tokens, start + most)
        allocation = self.kv.prepare(request.kv, start, end, prefix)
        assert allocation is not None
        if self._start(plan, request, allocation, now):
            return budget - (allocation.end - start)
        if self._load(plan, request):
            budget -= self._go_on(plan, request, budget - 1)
        return budget - 1

    def _start(self, plan: StepPlan, request: Request, allocation: Allocation, now: float) -> bool:
        """Whether it begins at once; False: its cached prefix is yet to be loaded."""
        prefix = allocation.prefix
        assert prefix is not None
        start, end, known = prefix.num_tokens, allocation.end, request.num_tokens
        taken = self.kv.apply(allocation)
        plan.copies += taken.copies
        self.tenants.remove(request)
        request.account.num_running += 1
        request.status = Status.RUNNING
        request.row = self._free_rows.pop()
        request.num_computed_tokens = start
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached_tokens = start
            for tier, count in self.kv.where_found(request.kv, prefix, taken).items():
                request.ledger.found(tier, count)
        insort(self._running, request, key=by_key)
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
            )
        )
        if taken.loads:
            for table, blocks in zip(taken.start, taken.blocks, strict=True):
                table += blocks
            request.loads, request.is_loading = taken.loads, True
            return False
        request.ledger.enter("prefill", now)
        plan.items.append(
            PlanItem(request.id, request.row, start, end - start, end == known, taken.blocks)
        )
        self._planned.append(request)
        return True

    def _load(self, plan: StepPlan, request: Request) -> bool:
        """Whether the row can go on in this step."""
        done = self._loading.go_on(plan, request)
        request.ledger.enter("prefill" if done else "loading", self._began)
        return done

    # ---- commit -----------------------------------------------------------------------------

    def commit(self, plan: StepPlan, output: StepOutput) -> list[RequestUpdate]:
        """Book the output of the last plan. Requests that left since then are ignored; updates
        come for those that got tokens. Finished ones hold nothing any more."""
        kv, now = self.kv, self._clock()
        self._plan = StepPlan()
        self._measure(plan, now - self._began - output.moving_s)
        self._loaded(output)
        updates = []
        planned, self._planned = self._planned, []
        for index, values in output.prompt_logprobs.items():
            # After a preemption some are computed again.
            known = planned[index].prompt_logprobs
            known += values[len(known) - plan.items[index].start :]
        for request, item, tokens, logprobs in zip(
            planned, plan.items, output.sampled, output.logprobs, strict=True
        ):
            if request.status is not Status.RUNNING:
                continue
            start, account = item.start, request.account
            computed = start + item.num_tokens
            request.ledger.step(item.num_tokens, len(planned), item.sample, now)
            reason: FinishReason | None = None
            if tokens:
                if item.num_drafts:
                    # All but the last sampled token are accepted drafts; the rest was in vain.
                    computed += len(tokens) - 1 - item.num_drafts
                count, reason = _append(request, tokens)
                if count < len(tokens):
                    tokens, logprobs = tokens[:count], logprobs[:count]
                    computed = min(computed, request.num_tokens)
                if request.first_token is None:
                    request.first_token = now
                account.sampled += count
                updates.append(RequestUpdate(request, tokens, logprobs, reason is not None))
            # What preemption made it compute again is nobody's debt.
            if request.num_reached_tokens > start:
                start = min(computed, request.num_reached_tokens)
            account.computed += computed - start
            request.num_computed_tokens = computed
            if computed >= request.kv.next_event:
                kv.advance(request.kv, request.token_ids, computed)
            if reason is not None:
                self._finish(request, reason, now)
        return updates

    def _loaded(self, output: StepOutput) -> None:
        """Contents that have come can be found; where some were lost all are computed again."""
        arrived, failed = self._loading.committed(output.lost)
        for request in failed:
            self._fall_over(request)
        for request in arrived:
            if request.status is Status.RUNNING:
                request.is_loading = False
                self.kv.end_lookup(request.kv)
                self.kv.advance(request.kv, request.token_ids, request.num_computed_tokens)

    def _fall_over(self, request: Request) -> None:
        """What it was to begin with did not come: it is computed."""
        if request.status is not Status.RUNNING:
            return
        if not request.ledger.steps:
            request.num_cached_tokens, request.first_scheduled = 0, None
            request.ledger.cached.clear()
        self._preempt(request, "failure")
        self.kv.give_up_lookup(request.kv)

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        """Learn from the step that was computed how long such steps take."""
        if not plan.items:
            return
        rows = self._num_decodes
        tokens = products = 0
        for item in plan.items[rows:]:
            tokens += item.num_tokens
            products += item.num_tokens * (2 * item.start + item.num_tokens)
        self.chunks.book(rows, tokens, products / (2 * tokens) if tokens else 0.0, seconds)

    # ---- what others may ask ----------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def idle_s(self) -> float:
        """Seconds until a plan can have something in it, where all wait for their tenants' rates."""
        if self._running or not self.tenants.num_waiting:
            return 0.0
        if self._num_pending:
            return LOOK_AGAIN_S
        return self.tenants.idle_s(self._clock())

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self.tenants.num_waiting

    @property
    def num_preemptions(self) -> int:
        return sum(self.preemptions.values())

    @property
    def num_held_up(self) -> int:
        """How often a tenant's requests began to wait for its budget."""
        return self.tenants.num_held_up

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks held by running requests, 0 to 1."""
        return self.kv.usage

    def check(self) -> None:
        """Assert all invariants, for tests and for an idle engine."""
        running, waiting = self._running, list(self.tenants)
        assert running == sorted(running, key=by_key)
        assert {r.id for r in running + waiting} == set(self._requests)
        assert len(running) + len(waiting) == len(self._requests) == len(running) + self.num_waiting
        rows = [r.row for r in running] + self._free_rows
        assert sorted(rows) == list(range(self.max_rows)), "a row is lost or used twice"
        for request in running:
            assert request.status is Status.RUNNING
            assert request.num_computed_tokens < request.num_tokens < request.max_total_tokens
            assert request.num_computed_tokens <= request.kv.capacity
            lookup = request.kv.lookup
            assert request.is_loading or not (lookup and lookup.ticket), "pinned for nobody"
        for request in waiting:
            assert request.status is Status.WAITING
            assert request.row == -1 and request.num_computed_tokens == 0
            assert request.kv.capacity == 0
        self.tenants.check(running)
        self.kv.check(request.kv for request in running)
        self.sessions.check()


def _append(request: Request, tokens: list[int]) -> tuple[int, FinishReason | None]:
    """Append sampled tokens up to the one that ends the request; how many, and why it ended."""
    token_ids = request.token_ids
    for count, token in enumerate(tokens, 1):
        token_ids.append(token)
        if token in request.stop_ids:
            return count, "stop"
        if len(token_ids) >= request.max_total_tokens:
            return count, "length"
    return len(tokens), None
