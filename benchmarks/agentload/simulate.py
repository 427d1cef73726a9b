"""A load through the real scheduler and KV accounting, with a model that takes time by a formula.

Nothing is computed, so thousands of turns take seconds; what is counted does not depend on the
machine. Clients are served in virtual time: a turn comes its pause after the end of the one before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from itertools import count

from agentload.load import Load, Session, quantiles
from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.base.handling import Handling
from elinvar.base.plan import StepOutput, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.kv.tiers.hierarchy import Tiers
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tree import Node
from elinvar.sched.request import Request
from elinvar.sched.scheduler import Scheduler

MAX_ROWS = 32
MAX_STEP_TOKENS = 512
MAX_CONTEXT = 8192
HOST_OVERHEAD = 1 << 16
"""Bytes of a host tier that hold no block, and more."""
DOOR = 32
"""How many of those who wait are compared."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds; about those of SmolLM2-135M on two cores."""

    step: float = 0.008
    """Of any step: the weights are read."""
    token: float = 0.0005
    """Of each token of a prompt,"""
    depth: float = 1e-7
    """and for each token that it attends to."""
    row: float = 0.0005
    """Of each row that decodes."""
    move: float = 0.0002
    """Of a block that is moved from or to memory below the provider's."""

    def faster(self, times: float) -> Costs:
        return Costs(*(value / times for value in astuple(self)))

    def of(self, plan: StepPlan) -> float:
        seconds = self.step + self.move * (len(plan.saves) + len(plan.loads))
        for item in plan.items:
            seconds += self.depth * item.num_tokens * (item.start + item.num_tokens / 2)
            seconds += self.row if item.num_tokens == 1 else self.token * item.num_tokens
        return seconds


@dataclass(slots=True)
class Result:
    """Of one run."""

    computed: int
    """Prompt tokens computed, again after preemptions included; comparable to oracle.least."""
    again: int
    """Of these, how many the oracle does not compute."""
    least: int
    first_turns: list[float] = field(default_factory=list)
    """Seconds until the first token."""
    returning: list[float] = field(default_factory=list)
    evictions: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    """When the last answer was whole."""

    @property
    def ratio(self) -> float:
        return self.computed / self.least

    def as_json(self) -> dict[str, float]:
        first, back = self.first_turns or [0.0], self.returning or [0.0]
        p50, p95 = quantiles(back, 0.5, 0.95)
        return {
            "computed": self.computed,
            "computed_over_least": round(self.ratio, 4),
            "again": self.again,
            "ttft_first_p50": round(quantiles(first, 0.5)[0], 4),
            "ttft_returning_p50": round(p50, 4),
            "ttft_returning_p95": round(p95, 4),
            "evictions": self.evictions,
            "preemptions": self.preemptions,
            "seconds": round(self.seconds, 2),
        }


@dataclass(slots=True, eq=False)
class Visit:
    """A turn that is being served."""

    session: Session
    turn: int
    came: float
    request: Request
    answer: list[int]


class Watcher:
    """What may follow a run, and steer which blocks yield. Does nothing here."""

    def begin(
        self,
        scheduler: Scheduler,
        now: Callable[[], float],
        host: HostTier | None,
        host_bytes: int,
    ) -> None:
        """host_bytes: of blocks that `host` holds."""

    def arrives(self, visit: Visit) -> None: ...

    def ends(self, visit: Visit, due: tuple[float, ...]) -> None:
        """due: when its next turn, and forks of it that have not begun, will come."""


Evicted = Callable[[int, Node], None]
Hint = Callable[[Session, int], float | None]
"""What the client of a session says with a turn: seconds from its end until the next, 0 for never."""


def no_hint(session: Session, turn: int) -> float | None:
    return None


def waits_for(session: Session, turn: int) -> str:
    """The tool that a turn's answer calls; after the last turn one as before."""
    return session.tools[min(turn + 1, len(session.tools) - 1)]


def exact_hint(session: Session, turn: int) -> float | None:
    """Of those who end without notice: nothing."""
    if turn + 1 < len(session.turns):
        return session.pauses[turn + 1]
    return 0.0 if session.notice else None


def end_hint(session: Session, turn: int) -> float | None:
    """Notice of the end, where it is given, and nothing else."""
    return 0.0 if turn + 1 == len(session.turns) and session.notice else None


class Simulation:
    """One run. `hint`: None where requests say nothing of their sessions. cached_first: of those at
    the door the one with the smallest share to compute goes in first, instead of who came first.
    prepare: what is switched on in its scheduler. host_tokens: what a host tier holds; 0: there is none.
    tools: whether requests name the tool that comes next."""

    def __init__(
        self,
        load: Load,
        pool_tokens: int,
        watcher: Watcher | None = None,
        hint: Hint | None = None,
        costs: Costs | None = None,
        cached_first: bool = False,
        prepare: Callable[[Scheduler], None] | None = None,
        host_tokens: int = 0,
        tools: bool = False,
    ) -> None:
        self.now = 0.0
        self._tools = tools
        self._cached_first = cached_first
        self._door: list[Visit] = []
        self._load, self._hint, self._costs = load, hint, costs or Costs()
        spec = KVSpec("full", (0,), 1, 8, block_size=BLOCK_SIZE)
        self.scheduler = Scheduler(
            [spec],
            [-(-pool_tokens // BLOCK_SIZE)],
            MAX_ROWS,
            MAX_STEP_TOKENS,
            MAX_CONTEXT,
            frozenset(),
            clock=lambda: self.now,
        )
        self._tiers: Tiers | None = None
        host: HostTier | None = None
        self._content = memoryview(bytearray(spec.block_bytes))
        if host_tokens:
            num_bytes = HOST_OVERHEAD + -(-host_tokens // BLOCK_SIZE) * (spec.block_bytes + 96)
            host = HostTier(None, num_bytes, [spec.block_bytes])
            self._tiers = Tiers(host, clock=lambda: self.now)
            self.scheduler.use_tiers(self._tiers)
        if prepare is not None:
            prepare(self.scheduler)
        self._watcher = watcher or Watcher()
        host_bytes = -(-host_tokens // BLOCK_SIZE) * spec.block_bytes
        self._watcher.begin(self.scheduler, lambda: self.now, host, host_bytes)
        self._num_evicted = 0
        for pool in self.scheduler.kv.pools:
            pool.evicted = self._counting(pool.evicted)
        self._order = count()
        self._to_come: list[tuple[float, int, Session, int]] = []
        self._visits: dict[str, Visit] = {}
        self._due: dict[Session, list[float]] = {}
        """When the next turn of a session, and its forks that have not begun, will come."""

    def _counting(self, told: Evicted | None) -> Evicted:
        def evicted(block: int, node: Node) -> None:
            self._num_evicted += 1
            if told is not None:
                told(block, node)

        return evicted

    def run(self, least: int) -> Result:
        result = Result(0, 0, least)
        for session in self._load.sessions:
            if session.conversation.parent is None:
                self._expect(session.at, session, 0)
        computed = 0
        while self._to_come or self._visits:
            if not self._visits:
                self.now = max(self.now, self._to_come[0][0])
            while self._to_come and self._to_come[0][0] <= self.now:
                came, _, session, turn = heapq.heappop(self._to_come)
                self._arrive(came, session, turn)
            computed += self._step(result)
        if self._tiers is not None:
            self._tiers.close()
        answers = sum(turn.answer - 1 for one in self._load.sessions for turn in one.turns)
        result.computed = computed - answers
        result.again = result.computed - least
        result.evictions = self._num_evicted
        result.preemptions = self.scheduler.num_preemptions
        result.seconds = self.now
        return result

    def _expect(self, at: float, session: Session, turn: int) -> None:
        heapq.heappush(self._to_come, (at, next(self._order), session, turn))

    def _arrive(self, came: float, session: Session, turn: int) -> None:
        one = session.turns[turn]
        tokens = self._load.tokens(session, one.prompt + one.answer)
        handling = Handling()
        if self._hint is not None:
            after = self._hint(session, turn)
            kind = waits_for(session, turn) if self._tools else None
            handling = Handling(session=session.name, expect_return_s=after, pause_kind=kind)
        request = Request(
            f"{session.name} {turn}",
            tokens[: one.prompt],
            SamplingParams(one.answer, ignore_eos=True, seed=0),
            handling=handling,
        )
        visit = Visit(session, turn, came, request, tokens[one.prompt :])
        self._visits[request.id] = visit
        self._door.append(visit)
        self._watcher.arrives(visit)

    def _let_in(self) -> None:
        """In order of arrival all; else one at a time, so that the next is chosen by what is cached
        then. Nobody is overtaken by more than come within the first DOOR."""
        scheduler, door = self.scheduler, self._door
        if not self._cached_first:
            for visit in door:
                scheduler.add(visit.request)
            door.clear()
        while door and not scheduler.num_waiting:
            first = min(door[:DOOR], key=self._share_to_compute)
            door.remove(first)
            scheduler.add(first.request)

    def _share_to_compute(self, visit: Visit) -> float:
        kv, tokens = self.scheduler.kv, visit.request.token_ids
        return 1 - kv.find_prefix(kv.new_sequence(), tokens).num_tokens / len(tokens)

    def _step(self, result: Result) -> int:
        """One step; how many tokens it computed."""
        self._let_in()
        plan = self.scheduler.plan()
        if plan.is_empty:  # it waits for what is brought up
            self.now += max(self.scheduler.idle_s, self._costs.step)
            return 0
        self.now += self._costs.of(plan)
        output = StepOutput([], [], lost=self._move(plan))
        for item in plan.items:
            visit = self._visits[item.request_id]
            at = item.start + item.num_tokens - visit.request.num_prompt_tokens
            output.sampled.append([visit.answer[at]] if item.sample else [])
            output.logprobs.append([])
        for update in self.scheduler.commit(plan, output):
            visit = self._visits[update.request.id]
            if update.request.first_token == self.now and len(visit.request.output_token_ids) == 1:
                kind = result.returning if visit.turn else result.first_turns
                kind.append(self.now - visit.came)
            if update.finished:
                self._end(visit)
        return plan.num_tokens

    def _move(self, plan: StepPlan) -> list[bytes]:
        """Saves and loads, by the real tier: keys that were not to be had."""
        tiers = self._tiers
        if tiers is None:
            return []
        for move in plan.saves:
            tiers.put(move.key, self._content)
        return [move.key for move in plan.loads if not tiers.get(move.key, self._content)]

    def _end(self, visit: Visit) -> None:
        del self._visits[visit.request.id]
        due = self._due.setdefault(visit.session, [])
        due[:] = [at for at in due if at > self.now]
        for session, turn in visit.session.after(visit.turn):
            at = self.now + session.pauses[turn]
            due.append(at)
            self._expect(at, session, turn)
        self._watcher.ends(visit, tuple(due))
