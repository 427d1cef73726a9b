"""Tenants: what each of them was served, may take and has waiting.

Owns the queue: a list a tenant, so that one over its budget holds up nobody else. It must not know
blocks or rows.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from elinvar.base.errors import QueueFullError
from elinvar.base.limits import ANY_TENANT, TenantLimits
from elinvar.sched.ledger import Waits
from elinvar.sched.request import Request

by_key = attrgetter("key")

MANY = 1000
"""Tenants without requests that are remembered."""
MOMENT = 1e-3
"""Seconds. No wait is shorter, or rounding could make it nothing."""
LEAST_RETRY, MOST_RETRY = 1.0, 3600.0


@dataclass(frozen=True, slots=True)
class Left:
    """Of a tenant's limits; None where it has none."""

    requests: int | None
    tokens: int | None
    full_s: float
    """Seconds until it may use as many tokens at once as it ever may."""


class Account:
    """One tenant's books."""

    __slots__ = (
        "_credit",
        "_level",
        "_seen",
        "_since",
        "computed",
        "held_up",
        "limits",
        "num_running",
        "queued",
        "sampled",
        "waiting",
        "waits",
        "weight",
    )

    def __init__(self, limits: TenantLimits, now: float) -> None:
        self.limits = limits
        self.weight = limits.weight
        self.waiting: list[Request] = []
        """In the order of their keys."""
        self.waits = Waits(now)
        self.queued = 0
        """Tokens that those who wait have already."""
        self.num_running = 0
        self.computed = 0
        """Tokens computed for it, except again."""
        self.sampled = 0
        self.held_up = False
        """Something waits that its budget does not let start."""
        self._credit = 0.0
        self._level = (limits.tokens_per_s or math.inf) * limits.burst_s
        self._seen = 0
        self._since = now

    @property
    def virtual(self) -> float:
        """What it was served for each unit of weight, and what it missed while it was away. A
        sampled token counts twice: its step reads the weights for few tokens."""
        return (self.computed + self.sampled) / self.weight + self._credit

    @property
    def active(self) -> bool:
        return bool(self.num_running or self.waiting)

    def come_back(self, virtual: float) -> None:
        """Who was away saved nothing up: it starts where those who were here are."""
        self._credit += max(0.0, virtual - self.virtual)

    def level(self, now: float) -> float:
        """Tokens that it may use now; below 0: that it used too early."""
        rate = self.limits.tokens_per_s
        if rate is None:
            return math.inf
        used, self._seen = self.computed - self._seen, self.computed
        full = rate * self.limits.burst_s
        self._level = min(full, self._level - used + rate * (now - self._since))
        self._since = now
        return self._level

    def left(self, now: float) -> Left:
        """Changes nothing, unlike `level`."""
        limits, requests, tokens, full_s = self.limits, None, None, 0.0
        if limits.max_running is not None and limits.max_waiting is not None:
            most = limits.max_running + limits.max_waiting
            requests = max(0, most - self.num_running - len(self.waiting))
        if (rate := limits.tokens_per_s) is not None:
            full = rate * limits.burst_s
            level = self._level - (self.computed - self._seen) + rate * (now - self._since)
            tokens = max(0, int(min(full, level)))
            full_s = max(0.0, (full - level) / rate)
        return Left(requests, tokens, full_s)

    def wait_s(self, now: float) -> float:
        """Seconds until its budget lets a request start; infinite: when one of its own ends."""
        most = self.limits.max_running
        if most is not None and self.num_running >= most:
            return math.inf
        level = self.level(now)
        if level >= 0:
            return 0.0
        assert self.limits.tokens_per_s is not None
        return max(MOMENT, -level / self.limits.tokens_per_s)


class Tenants:
    """The accounts of all tenants. `limits` by name (see EngineConfig.tenants); `turn` orders
    tenants by their first request; `share`: whether each has its share, or all one queue."""

    def __init__(
        self,
        limits: Mapping[str, TenantLimits],
        turn: Callable[[Request], float],
        share: bool,
    ) -> None:
        self._limits = limits
        self._turn = turn
        self._share = share
        self._accounts: dict[str, Account] = {}
        self._queued: dict[str, Account] = {}
        """Those that have somebody waiting."""
        self._last = 0.0
        """Counter of the last tenant that went away."""
        self._answer = 0.0
        """Tokens of an answer, of late."""
        self.num_waiting = 0
        self.num_held_up = 0
        """How often a tenant's requests began to wait for its budget."""

    def open(self, request: Request, now: float) -> None:
        """Give a request its tenant's account."""
        name = request.handling.tenant
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= MANY:
                self._forget(now)
            limits = self._limits.get(name) or self._limits.get(ANY_TENANT) or TenantLimits()
            account = self._accounts[name] = Account(limits, now)
        if not account.waiting:
            account.waits.wait_for("step", now)
        if not account.active:
            others = (a.virtual for a in self._accounts.values() if a.active)
            account.come_back(min(others, default=self._last))
        request.account = account

    def _forget(self, now: float) -> None:
        self._accounts = {
            name: a for name, a in self._accounts.items() if a.active or a.level(now) < 0
        }

    def check_room(
        self,
        request: Request,
        running: Sequence[Request],
        max_rows: int,
        speed: float | None,
        now: float,
    ) -> None:
        """Raises QueueFullError when as many of its tenant's requests wait as may, besides those that
        the next steps may begin. speed: measured tokens a second."""
        account = request.account
        limits, own = account.limits, account.num_running
        if limits.max_waiting is None:
            return
        may_run = limits.max_running
        if may_run is None:
            may_run = own + max_rows - len(running)
        if own + len(account.waiting) < may_run + limits.max_waiting:
            return
        seconds = self._work_ahead_s(account, running, speed, now)
        tenant = request.handling.tenant
        who = f"of tenant {tenant!r} " if tenant else ""
        raise QueueFullError(
            f"{own} requests {who}run and {len(account.waiting)} wait already; send this one again "
            f"in {seconds:.0f} seconds.",
            seconds,
        )

    def _work_ahead_s(
        self, account: Account, running: Sequence[Request], speed: float | None, now: float
    ) -> float:
        """Seconds to do what waits and runs: its own at its share of the machine, or everybody's
        where they have one queue; or until its rate allows that, if that is later."""
        own = self._left([account], [r for r in running if r.account is account])
        seconds = 0.0
        if speed and self._share:
            weights = sum(a.weight for a in self._accounts.values() if a.active)
            seconds = own * weights / account.weight / speed
        elif speed:
            seconds = self._left(self._queued.values(), running) / speed
        if rate := account.limits.tokens_per_s:
            seconds = max(seconds, (own - account.level(now)) / rate)
        return float(math.ceil(min(max(seconds, LEAST_RETRY), MOST_RETRY)))

    def _left(self, accounts: Iterable[Account], running: Sequence[Request]) -> float:
        """Tokens still to compute, with answers as long as they were of late; those that run are
        half done."""
        waiting = sum(a.queued + len(a.waiting) * self._answer for a in accounts)
        begun = sum(r.num_tokens - r.num_computed_tokens for r in running)
        return waiting + begun + len(running) * self._answer / 2

    # ---- the queue --------------------------------------------------------------------------

    def push(self, request: Request) -> None:
        account = request.account
        insort(account.waiting, request, key=by_key)
        account.queued += request.num_tokens
        self._queued[request.handling.tenant] = account
        self.num_waiting += 1

    def remove(self, request: Request) -> None:
        account = request.account
        account.waiting.remove(request)
        account.queued -= request.num_tokens
        self.num_waiting -= 1
        if not account.waiting:
            account.held_up = False
            del self._queued[request.handling.tenant]

    def left(self, name: str, now: float) -> Left | None:
        """What a tenant may still ask for; None: it did not ask for anything lately. Another thread
        may look, and sees what was true a moment ago."""
        account = self._accounts.get(name)
        return None if account is None else account.left(now)

    def wait_for(self, cause: str, now: float) -> None:
        """From now on, whoever waits waits for this, or for its tenant's budget."""
        for account in self._queued.values():
            account.waits.wait_for("tenant" if account.held_up else cause, now)

    def head(self, now: float, put_off: Collection[Request] = ()) -> Request | None:
        """Who is next of those whose tenants' budgets allow it, but those `put_off`."""
        best, rank = None, None
        for account in self._queued.values():
            if account.wait_s(now):
                if not account.held_up:
                    account.held_up = True
                    self.num_held_up += 1
                continue
            account.held_up = False
            first = next((r for r in account.waiting if r not in put_off), None)
            if first is not None and (rank is None or self.rank(first) < rank):
                best, rank = first, self.rank(first)
        return best

    def rank(self, request: Request) -> tuple[bool, float, float, int]:
        return request.is_batch, self._turn(request), request.place, request.order

    def gone(self, request: Request) -> None:
        """A request ended."""
        if not request.account.active:
            self._last = request.account.virtual
        if request.finish_reason != "abort":
            answer = request.num_tokens - request.num_prompt_tokens
            self._answer += (answer - self._answer) / 8

    def idle_s(self, now: float) -> float:
        """Seconds until somebody's budget lets a request start."""
        return min((a.wait_s(now) for a in self._queued.values()), default=0.0)

    def __iter__(self) -> Iterator[Request]:
        for account in self._queued.values():
            yield from account.waiting

    def check(self, running: Sequence[Request]) -> None:
        """Assert all invariants, given who runs."""
        for account in self._accounts.values():
            assert account.waiting == sorted(account.waiting, key=by_key)
            assert account.queued == sum(r.num_tokens for r in account.waiting)
            assert account.num_running == sum(r.account is account for r in running)
            assert bool(account.waiting) == any(a is account for a in self._queued.values())
