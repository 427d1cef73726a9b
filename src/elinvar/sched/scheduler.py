"""Scheduler: plans which tokens each request computes in the next step, and books the result.

What others drive and ask; who is here is sched.roster's, a plan sched.planner's, the queue
sched.tenants', its order the policy's, blocks the KVManager's. It runs no model and reads no text. Not
thread-safe: one thread calls it. The rules and their reasons are in
docs/design/002-scheduler-and-kv.md and docs/design/022-who-goes-first.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from elinvar.base.config import KVSpec
from elinvar.base.errors import InputError
from elinvar.base.limits import Target, TenantLimits
from elinvar.base.plan import PlanItem, StepOutput, StepPlan, TokenLogprobs, Wave
from elinvar.base.sampling import WATCHED
from elinvar.kv.manager import KVManager
from elinvar.kv.sequence import SequenceKV
from elinvar.kv.sessions import Sessions
from elinvar.sched.ahead import Ahead
from elinvar.sched.chunks import Chunks
from elinvar.sched.door import max_total_tokens
from elinvar.sched.ledger import Ledger
from elinvar.sched.loading import Loading
from elinvar.sched.planner import Planner
from elinvar.sched.policy import Fair, FirstCome, Policy
from elinvar.sched.request import FinishReason, Request, RequestUpdate, Status
from elinvar.sched.room import Room
from elinvar.sched.roster import Roster
from elinvar.sched.tenants import Tenants
from elinvar.sched.wave import mean_depth

if TYPE_CHECKING:
    from elinvar.kv.tiers.hierarchy import Tiers

UNLIMITED = Target(ttft_s=1.0, itl_s=None)
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
    num_layers: of the model; 1: prompts are cut by tokens alone. max_drafts: of a row in a step.
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
        num_layers: int = 1,
        max_drafts: int = 0,
    ) -> None:
        self.kv = KVManager(specs, num_blocks, prefix_cache, namespace)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.max_context = max_context
        self.eos_ids = eos_ids
        self.policy = policy or FirstCome()
        self.tenants = Tenants(tenants or {}, self.policy.turn, isinstance(self.policy, Fair))
        self.sessions = Sessions(self.kv, clock, tenants or {})
        self.chunks = Chunks(interactive, batch, num_layers)
        self.loading = Loading(specs)
        self.room = Room(self.kv, self.policy, self.tenants, max_step_tokens, specs[0].block_size)
        self._clock = clock
        self._roster = Roster(self.kv, self.tenants, self.sessions, max_rows, clock)
        parts = self._roster, self.room, self.loading, self.chunks
        self._planner = Planner(*parts, max_step_tokens, max_drafts)
        self._ahead = Ahead(self._roster)
        self._plan: StepPlan | None = None
        """Waits for its commit."""
        self._next: tuple[StepPlan, list[Request]] | None = None
        """The plan ahead of that, and whom it touches."""
        self._began, self._num_decodes = 0.0, 0
        self._num_pending = 0
        """Of those that wait: for whom more may yet be found or fetched."""

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
        if request.id in self._roster.requests:
            raise InputError("request_id", f"Request id {request.id!r} is in use: choose another.")
        now = self._clock()
        self.tenants.open(request, now)
        running = self._roster.running
        self.tenants.check_room(request, running, self.max_rows, self.chunks.speed, now)
        stop_ids = frozenset(request.params.stop_token_ids)
        request.stop_ids = stop_ids if request.params.ignore_eos else stop_ids | self.eos_ids
        request.kv = self._new_sequence(request)
        request.arrival = request.arrival or now
        request.ledger = Ledger(request.account.waits, request.arrival, now)
        request.place = self.policy.place(request, self.chunks.prompt_s(request.num_prompt_tokens))
        self._roster.add(request)

    def _new_sequence(self, request: Request) -> SequenceKV:
        if not request.sees_part:
            return self.kv.new_sequence(request.namespace, request.params.kept_blocks)
        # What its last tokens attend to is measured when they are computed.
        length = request.num_prompt_tokens
        return self.kv.new_sequence(request.namespace, None, length, length - WATCHED + 1)

    def abort(self, request_id: str) -> bool:
        """Cancel a request at any moment, also between plan and commit; its blocks are free at
        once. False when there is none of this id (it may just have finished)."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason = "stop") -> bool:
        """End a request from outside, for example because a stop text appeared."""
        request = self._roster.requests.get(request_id)
        if request is None:
            return False
        self._roster.finish(request, reason, self._clock())
        return True

    def preempt(self, request_id: str) -> None:
        """Take row and blocks from a running request; it waits, in its old place, to be computed
        again. Its tokens stay, so no result changes."""
        request = self._roster.requests.get(request_id)
        if request is not None and request.status is Status.RUNNING:
            self._roster.preempt(request, "asked")

    # ---- plan -------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step. The runner applies released_rows, then started, then items: a row may
        be released and started in one plan. After a plan that was never committed a row may be
        released twice, or without having been started.

        When nobody can go on the plan is empty, and needs neither execute nor commit: see idle_s.
        """
        while self._plan is not None:
            self._drop(self._plan)
        draft = self._planner.draft()
        self._plan = plan = draft.plan
        self._began, self._num_decodes = draft.began, draft.num_decodes
        self._num_pending = draft.num_pending
        # Also where somebody waits for what is fetched: the blocks that it will take can be given up.
        idle = plan.is_empty and not self._roster.running
        plan.saves = self.kv.saves(bool(self._num_pending) or idle)
        self._ahead.look(self._num_pending)
        if not plan.is_empty:
            plan.released_rows = self._roster.take_released()
        return plan

    def plan_ahead(self) -> StepPlan | None:
        """The step after the last plan, which is yet to be committed, where all in it go on by the token
        that they sample there. None: that is to be committed first. Both are committed in their order;
        of requests that ended meanwhile the second brings nothing."""
        assert self._plan is not None and self._next is None
        self._next = self._ahead.draft(self._plan)
        if self._next is None:
            return None
        plan = self._next[0]
        plan.saves = self.kv.saves(False)
        return plan

    def _drop(self, oldest: StepPlan) -> None:
        """The oldest plan was never committed (the runner failed, or Ctrl-C came in between): what
        was written is unknown, so its requests are computed again."""
        roster = self._roster
        for request in self.loading.dropped():
            roster.fall_over(request)
        for request in roster.planned:
            if request.status is Status.RUNNING:
                roster.preempt(request, "failure")
        roster.give_back(oldest.released_rows)
        self._shift()

    def _shift(self) -> list[Request]:
        """The oldest plan waits no more; returns whom it touched."""
        roster = self._roster
        planned, roster.planned, roster.is_ahead, self._plan = roster.planned, [], False, None
        if self._next is not None:
            self._plan, roster.planned = self._next
            self._next, roster.is_ahead = None, True
        return planned

    # ---- commit -----------------------------------------------------------------------------

    def commit(self, plan: StepPlan, output: StepOutput) -> list[RequestUpdate]:
        """Book the output of the oldest plan; one before it was lost. Requests that left since then are
        ignored; updates come for those that got tokens. Finished ones hold nothing any more."""
        now = self._clock()
        if self._plan is not None and self._plan is not plan:
            self._drop(self._plan)
        if not plan.is_ahead:
            self._measure(plan, output, self._num_decodes, now - self._began - output.moving_s)
        elif output.step_s is not None:
            self._measure(plan, output, len(plan.items), output.step_s)
        planned = self._shift()
        self._loaded(output)
        batch, results = len(planned), plan.results
        if plan.wave is not None:
            self._advance(plan.wave, planned[len(plan.items) :], batch)
        for index, values in output.prompt_logprobs.items():
            # After a preemption some are computed again.
            known = planned[index].prompt_logprobs
            known += values[len(known) - results[index].start :]
        updates = []
        # Not strict: of a wave that has not ended there is nothing to book.
        for i, (request, item, tokens, logprobs) in enumerate(
            zip(planned, results, output.sampled, output.logprobs, strict=False)
        ):
            if request.status is Status.RUNNING:
                request.ledger.step(item.num_tokens, batch, item.sample, now)
                request.num_drafted += output.num_drafted.get(i, 0)
                update = self._book(request, item, tokens, logprobs, output.kept.get(i), now)
                if update is not None:
                    updates.append(update)
        return updates

    def _advance(self, planned: Wave, requests: list[Request], batch: int) -> None:
        """The wave got further; or, if somebody left it since the plan was made, there is none."""
        wave = self._roster.wave
        if wave is not None:
            wave.num_done = planned.end
            if planned.is_last:
                self._roster.end_wave()
        if not planned.is_last:
            for request in requests:
                request.ledger.pass_by(batch)

    def _book(
        self,
        request: Request,
        item: PlanItem,
        tokens: list[int],
        logprobs: list[TokenLogprobs],
        kept: list[int] | None,
        now: float,
    ) -> RequestUpdate | None:
        """Of one request what its span brought. kept: as in StepOutput."""
        start, account = item.start, request.account
        computed = start + item.num_tokens
        reason: FinishReason | None = None
        update = None
        if tokens:
            # All but the last sampled token are accepted drafts, whose span was computed, too.
            computed += len(tokens) - 1
            request.num_accepted += len(tokens) - 1
            count, reason = _append(request, tokens)
            if count < len(tokens):
                tokens, logprobs = tokens[:count], logprobs[:count]
                computed = min(computed, request.num_tokens)
            if request.first_token is None:
                request.first_token = now
            account.sampled += count
            update = RequestUpdate(request, tokens, logprobs, reason is not None)
        # What preemption made it compute again is nobody's debt.
        if request.num_reached_tokens > start:
            start = min(computed, request.num_reached_tokens)
        account.computed += computed - start
        request.num_computed_tokens = computed
        if computed >= request.kv.next_event:
            self.kv.advance(request.kv, request.token_ids, computed)
        if kept is not None:
            self.kv.keep(request.kv, kept)
        if reason is not None:
            self._roster.finish(request, reason, now)
        return update

    def _loaded(self, output: StepOutput) -> None:
        """Contents that have come can be found; where some were lost all are computed again."""
        arrived, failed = self.loading.committed(output.lost)
        for request in failed:
            self._roster.fall_over(request)
        for request in arrived:
            if request.status is Status.RUNNING:
                request.is_loading = False
                self.kv.end_lookup(request.kv)
                self.kv.advance(request.kv, request.token_ids, request.num_computed_tokens)

    def _measure(self, plan: StepPlan, output: StepOutput, rows: int, seconds: float) -> None:
        """Learn from the step that was computed how long such steps take."""
        wave = plan.wave
        if output.num_drafted:  # which took time of their own
            return
        if wave is not None:
            tokens, depth = sum(i.num_tokens for i in wave.items), mean_depth(wave.items)
            self.chunks.book_wave(rows, tokens, depth, output.layer_s, seconds)
        elif plan.items:
            prompts = plan.items[rows:]
            tokens = sum(item.num_tokens for item in prompts)
            self.chunks.book(rows, tokens, mean_depth(prompts), seconds)

    # ---- what others may ask ----------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._roster.requests)

    @property
    def idle_s(self) -> float:
        """Seconds until a plan can have something in it, where all wait for their tenants' rates."""
        if self._roster.running or not self.tenants.num_waiting:
            return 0.0
        if self._num_pending:
            return LOOK_AGAIN_S
        return self.tenants.idle_s(self._clock())

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        return self.tenants.num_waiting

    @property
    def preemptions(self) -> Mapping[str, int]:
        """How many there were, by cause."""
        return self._roster.preemptions

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
        self._roster.check()


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
