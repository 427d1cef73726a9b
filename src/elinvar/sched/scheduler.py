"""Scheduler: plans which tokens each request computes in the next step, and books the result.

Owns the queues, the rows and the token budget; blocks are the KVManager's. It runs no model and
reads no text. Not thread-safe: one thread calls it. The rules and their reasons are in
docs/design/002-scheduler-and-kv.md.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter

from elinvar.base.config import KVSpec
from elinvar.base.errors import InputError
from elinvar.base.plan import PlanItem, RowStart, StepOutput, StepPlan
from elinvar.kv.manager import KVManager
from elinvar.kv.sequence import Allocation
from elinvar.sched.door import max_total_tokens
from elinvar.sched.request import FinishReason, Request, RequestUpdate, Status

_by_order = attrgetter("order")


class Scheduler:
    """Continuous batching with chunked prefill under one token budget.

    specs, num_blocks: the KV groups and the size of each pool, in blocks.
    max_rows: requests running at once. max_step_tokens: token budget of a step.
    max_context: longest sequence, prompt and answer. eos_ids: the model's end tokens.
    namespace: what cached blocks depend on besides tokens (the weights' version).
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
    ) -> None:
        self.kv = KVManager(specs, num_blocks, prefix_cache, namespace)
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.max_context = max_context
        self.eos_ids = eos_ids
        self.num_preemptions = 0
        self._clock = clock
        self._requests: dict[str, Request] = {}
        # Both in order of arrival, whatever was preempted in between.
        self._running: list[Request] = []
        self._waiting: list[Request] = []
        self._num_added = 0
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._released: list[int] = []
        # The plan that waits for its commit, and its items' requests. By object, not by id: an id
        # may come back as another request before the commit.
        self._plan = StepPlan()
        self._planned: list[Request] = []
        self._no_blocks: list[list[int]] = [[] for _ in specs]

    # ---- requests come and go ---------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. InputError when it could never run, even alone on an idle engine."""
        request.max_total_tokens = max_total_tokens(
            request.num_prompt_tokens,
            request.params.max_tokens,
            self.max_context,
            self.kv.longest(request.params.kept_blocks),
        )
        if request.id in self._requests:
            raise InputError("request_id", f"Request id {request.id!r} is in use: choose another.")
        stop_ids = frozenset(request.params.stop_token_ids)
        request.stop_ids = stop_ids if request.params.ignore_eos else stop_ids | self.eos_ids
        request.kv = self.kv.new_sequence(request.namespace, request.params.kept_blocks)
        request.order = self._num_added
        request.arrival = self._clock()
        self._num_added += 1
        self._requests[request.id] = request
        self._waiting.append(request)

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
        """Take row and blocks from a running request; it waits, in its old place by arrival, to
        be computed again. Its tokens stay, so no result changes."""
        request = self._requests.get(request_id)
        if request is not None and request.status is Status.RUNNING:
            self._preempt(request)

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, request, key=_by_order)

    def _finish(self, request: Request, reason: FinishReason, now: float) -> None:
        if request.status is Status.RUNNING:
            self._release(request)
        else:
            self._waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.finished = now
        del self._requests[request.id]

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        self.kv.free(request.kv)
        self._free_rows.append(request.row)
        self._released.append(request.row)
        request.row = -1

    # ---- plan -------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step. The runner applies released_rows, then started, then items: a row may
        be released and started in one plan. After a plan that was never committed a row may be
        released twice, or without having been started.

        When nobody has work the plan is empty, and needs neither execute nor commit.
        """
        self._drop_uncommitted()
        self._plan = plan = StepPlan()
        num_preemptions = self.num_preemptions
        budget = self._plan_running(plan)
        # Who was just preempted is at the head of the queue, and its blocks may still be cached:
        # not back in the same step, or the two would take turns.
        if self._waiting and self._free_rows and num_preemptions == self.num_preemptions:
            self._plan_waiting(plan, budget)
        if plan.items:
            plan.released_rows, self._released = self._released, []
        return plan

    def _drop_uncommitted(self) -> None:
        """The last plan was never committed (the runner failed, or Ctrl-C came in between): what
        was written is unknown, so its requests are computed again."""
        if self._planned:
            for request in self._planned:
                if request.status is Status.RUNNING:
                    self._preempt(request)
            self._released = list(dict.fromkeys(self._plan.released_rows + self._released))
            self._planned = []

    def _plan_running(self, plan: StepPlan) -> int:
        """Plan all that hold a row, oldest first; returns what is left of the budget.

        Each gets a token, and rows amid their prompts what is left, in their order. Nobody goes
        away empty-handed: rows are admitted only while budget is left, so there are never more of
        them than tokens. A victim of preemption is not in the plan yet, since it is the youngest.
        """
        running, items, planned = self._running, plan.items, self._planned
        budget = self.max_step_tokens - len(running)
        index = 0
        while index < len(running):
            request = running[index]
            index += 1
            start = request.num_computed_tokens
            end = known = len(request.token_ids)
            if known - start > 1:
                end = min(known, start + 1 + budget)
            new_blocks = self._no_blocks
            if end > request.kv.capacity:
                allocation = self._make_room(request, start, end)
                if allocation is None:
                    break
                end = allocation.end
                new_blocks = self.kv.apply(allocation)
            if known - start > 1:
                budget -= end - start - 1
            items.append(
                PlanItem(request.id, request.row, start, end - start, end == known, new_blocks)
            )
            planned.append(request)
        return budget

    def _make_room(self, request: Request, start: int, end: int) -> Allocation | None:
        """Preempt from the youngest until `request` can go on; None when it was itself the
        youngest and had to go. The door saw to it that a request alone always has room."""
        while (allocation := self.kv.prepare(request.kv, start, end)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return None
        return allocation

    def _plan_waiting(self, plan: StepPlan, budget: int) -> None:
        """Admit in order of arrival while rows, budget and blocks last; nobody overtakes.

        Besides its own tokens' blocks a newcomer must leave those that running requests still
        need for theirs and one block for each of them, or it would soon be preempted again. With
        nobody running it is admitted in any case: all blocks are free, and the door saw that it
        fits.
        """
        kv, waiting, chunk = self.kv, self._waiting, self.max_step_tokens
        reserve = self._reserve(self._running)
        now = self._clock()
        while waiting and budget > 0 and self._free_rows:
            request = waiting[0]
            prefix = kv.find_prefix(request.kv, request.token_ids)
            if self._running and not kv.can_admit(
                prefix, request.num_tokens, chunk, reserve, request.kv.kept
            ):
                break
            start = prefix.num_tokens
            allocation = kv.prepare(
                request.kv, start, min(request.num_tokens, start + budget), prefix
            )
            assert allocation is not None
            del waiting[0]
            self._start(plan, request, allocation, now)
            budget -= allocation.end - start
            reserve = [a + b for a, b in zip(reserve, self._reserve([request]), strict=True)]

    def _reserve(self, requests: list[Request]) -> list[int]:
        kv = self.kv
        reserve = kv.spare(len(requests))
        for request in requests:
            if request.num_tokens > request.kv.capacity:
                more = kv.to_come_for(request.kv, request.num_tokens, self.max_step_tokens)
                reserve = [a + b for a, b in zip(reserve, more, strict=True)]
        return reserve

    def _start(self, plan: StepPlan, request: Request, allocation: Allocation, now: float) -> None:
        prefix = allocation.prefix
        assert prefix is not None
        start, end, known = prefix.num_tokens, allocation.end, request.num_tokens
        new_blocks = self.kv.apply(allocation)
        request.status = Status.RUNNING
        request.row = self._free_rows.pop()
        request.num_computed_tokens = start
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached_tokens = start
        insort(self._running, request, key=_by_order)
        # A copy: the plan is plain data, and the request's list grows.
        tokens = list(request.token_ids)
        plan.started.append(
            RowStart(
                request.id, request.row, tokens, request.params, prefix.blocks, request.adapter
            )
        )
        plan.items.append(
            PlanItem(request.id, request.row, start, end - start, end == known, new_blocks)
        )
        self._planned.append(request)

    # ---- commit -----------------------------------------------------------------------------

    def commit(self, plan: StepPlan, output: StepOutput) -> list[RequestUpdate]:
        """Book the output of the last plan. Requests that left since then are ignored; updates
        come for those that got tokens. Finished ones hold nothing any more."""
        kv, now = self.kv, self._clock()
        updates = []
        planned, self._planned = self._planned, []
        for request, item, tokens, logprobs in zip(
            planned, plan.items, output.sampled, output.logprobs, strict=True
        ):
            if request.status is not Status.RUNNING:
                continue
            computed = item.start + item.num_tokens
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
                updates.append(RequestUpdate(request, tokens, logprobs, reason is not None))
            request.num_computed_tokens = computed
            if computed >= request.kv.next_event:
                kv.advance(request.kv, request.token_ids, computed)
            if reason is not None:
                self._finish(request, reason, now)
        return updates

    # ---- what others may ask ----------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks held by running requests, 0 to 1."""
        return self.kv.usage

    def check(self) -> None:
        """Assert all invariants, for tests and for an idle engine."""
        running, waiting = self._running, self._waiting
        assert running == sorted(running, key=_by_order)
        assert waiting == sorted(waiting, key=_by_order)
        assert {r.id for r in running + waiting} == set(self._requests)
        assert len(running) + len(waiting) == len(self._requests)
        rows = [r.row for r in running] + self._free_rows
        assert sorted(rows) == list(range(self.max_rows)), "a row is lost or used twice"
        for request in running:
            assert request.status is Status.RUNNING
            assert request.num_computed_tokens < request.num_tokens < request.max_total_tokens
            assert request.num_computed_tokens <= request.kv.capacity
        for request in waiting:
            assert request.status is Status.WAITING
            assert request.row == -1 and request.num_computed_tokens == 0
            assert request.kv.capacity == 0
        self.kv.check(request.kv for request in running)


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
