"""Sessions: conversations whose cached contents are kept for their next turn.

Owns names, when each is expected back, and how much a tenant's sessions may keep; which block yields when
memory is short follows from it (kv.leases). A session is a name and hints: it changes no answer, and it never
keeps a block from who runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import count

from elinvar.base.errors import InputError
from elinvar.base.handling import Handling
from elinvar.base.limits import ANY_TENANT, TenantLimits
from elinvar.kv.leases import Leases
from elinvar.kv.manager import KVManager
from elinvar.kv.pauses import Pauses
from elinvar.kv.session import NO_HINTS, Account, Hints, NoSessionError, Session, SessionInfo
from elinvar.kv.tree import Node

MOST_NODES = 1 << 18
"""Of a tenant's sessions together: 8 million tokens, whose names take some 200 MB."""
MAX_SESSIONS = 4096
"""Of a tenant. One more takes the place of the one not used for longest, of those that pause."""

_MOST_EVENTS = 256
"""That are looked at in one go: after a long rest there may be one of each session."""


class Sessions:
    """limits: of tenants, by name (see EngineConfig.tenants)."""

    def __init__(
        self, kv: KVManager, clock: Callable[[], float], limits: Mapping[str, TenantLimits]
    ) -> None:
        self._kv, self._clock, self._limits = kv, clock, limits
        self._pauses = Pauses()
        self._leases = Leases(kv.pools, self._refresh)
        self._accounts: dict[str, Account] = {}
        # When something changes of those who pause: their worth, or that they are forgotten.
        self._events: list[tuple[float, int, Session]] = []
        self._numbers = count()
        self._num_begun = 0
        self.num_sessions = 0
        self.returns = {"hit": 0, "partial": 0, "miss": 0}
        """Turns of sessions that came back, by how much was still cached of what they left."""

    # ---- what the scheduler says ------------------------------------------------------------

    def begin(self, handling: Handling) -> Session | None:
        """A request came; None: it is of no session."""
        if handling.session is None:
            return None
        now = self._clock()
        self._refresh()
        session = self._get(handling.session, handling.tenant) or self._make(
            handling.session, handling.tenant, now
        )
        if not session.busy:
            self._end_pause(session, now, came_back=True)
            session.turns += 1
            session.is_new_turn = True
            session.expects_s = None
            # Of those who wait the last one is served last.
            self._num_begun += 1
            self._leases.place(session.lease, (True, -float(self._num_begun)))
        session.busy += 1
        if handling.expect_return_s is not None:
            session.expects_s = handling.expect_return_s
        if handling.pause_kind is not None:
            session.kind = handling.pause_kind
        self._use(session, now)
        return session

    def end(
        self, session: Session, path: Sequence[Node], num_prompt: int, num_cached: int | None
    ) -> None:
        """A request of it ended, which computed `path`. num_cached: of its prompt; None: it never
        ran."""
        now = self._clock()
        session.busy -= 1
        if session.account.sessions.get(session.name) is not session:  # it was deleted meanwhile
            return
        first, session.is_new_turn = session.is_new_turn, False
        if first and session.num_tokens and num_cached is not None:
            known = min(session.num_tokens, num_prompt - 1)
            found = "hit" if num_cached >= known else "partial" if num_cached else "miss"
            self.returns[found] += 1
        if path:
            # Who left amid a prompt that he sent before knows no less than he did.
            more = not first or path[-1] in session.path
            self._keep(session, session.path if path[-1] in session.path else path, more)
        self._use(session, now)
        if not session.busy:
            self._begin_pause(session, now)
        self._kv.trim_below(self._paths)

    # ---- what others may ask ----------------------------------------------------------------

    def of(self, tenant: str = "") -> list[SessionInfo]:
        """All of a tenant, the one used last first."""
        self._refresh()
        account = self._accounts.get(tenant)
        return [self._info(one) for one in reversed(account.sessions.values())] if account else []

    def info(self, name: str, tenant: str = "") -> SessionInfo:
        """Raises NoSessionError when there is none, as the next do."""
        self._refresh()
        session = self._find(name, tenant)
        memory, below = self._kv.places(session.path)
        return replace(self._info(session), tokens_in_memory=memory, tokens_below=below)

    def create(self, name: str, tenant: str = "", hints: Hints = NO_HINTS) -> SessionInfo:
        """Raises InputError where there is one of this name."""
        self._refresh()
        self._make_new(name, tenant)
        return self.hint(name, tenant, hints)

    def hint(
        self,
        name: str,
        tenant: str = "",
        hints: Hints = NO_HINTS,
    ) -> SessionInfo:
        """What its client knows of it now."""
        self._refresh()
        session, now = self._find(name, tenant), self._clock()
        if hints.expect_return_s is not None:
            session.expects_s = hints.expect_return_s
        if hints.ttl_s is not None:
            session.ttl_s = hints.ttl_s
        if hints.pause_kind is not None:
            session.kind = hints.pause_kind
        self._use(session, now)
        if not session.busy:
            # The pause until now tells of a class that it is not of, but it was waited.
            self._end_pause(session, now, came_back=False)
            self._begin_pause(session, now)
        return self._info(session)

    def fork(self, name: str, new: Sequence[str], tenant: str = "") -> list[SessionInfo]:
        """Sessions that go on from where this one is. Nothing is copied: they share its blocks until
        each writes its own."""
        self._refresh()
        source, now, made = self._find(name, tenant), self._clock(), []
        taken = [one for one in new if self._get(one, tenant)]
        if taken or len(set(new)) < len(new):
            raise _in_use(taken[0] if taken else new[0])
        self._use(source, now)  # else it might be the one that makes room
        for one in new:
            session = self._make_new(one, tenant)
            # Whoever forks what was to end will go on with it.
            session.expects_s = source.expects_s or None
            session.kind, session.ttl_s = source.kind, source.ttl_s
            self._leases.place(session.lease, source.lease.rank)
            self._keep(session, source.path, more=False)
            self._begin_pause(session, now)
            made.append(session)
        return [self._info(one) for one in made]

    def delete(self, name: str, tenant: str = "") -> None:
        """What only it would have come back to yields first from now on. Its requests go on."""
        self._forget(self._find(name, tenant))

    def forget_contents(self) -> None:
        """What was computed until now is of no use any more."""
        for session in self._all():
            session.path, session.num_tokens = [], 0
            self._leases.release(session.lease)

    def yield_all(self) -> None:
        """What they left is not in memory any more; it may be below."""
        for session in self._all():
            self._leases.release(session.lease)

    @property
    def leased_tokens(self) -> int:
        return len(self._kv.pools[0].leases) * self._kv.block_size

    def check(self) -> None:
        """Assert all invariants, for tests and for an idle engine."""
        sessions = list(self._all())
        assert len(sessions) == self.num_sessions
        self._leases.check([one.lease for one in sessions])
        noted = {number for _, number, _ in self._events}
        for session in sessions:
            assert session.busy >= 0
            assert session.busy or session.event in noted, "a session that never expires"
        for account in self._accounts.values():
            assert account.sessions and len(account.sessions) <= MAX_SESSIONS
            for charged, most in zip(account.owner.charged, account.owner.most, strict=True):
                assert charged <= most, "a tenant leases more than it may"

    # ---- names ------------------------------------------------------------------------------

    def _all(self) -> Iterator[Session]:
        for account in self._accounts.values():
            yield from account.sessions.values()

    def _get(self, name: str, tenant: str) -> Session | None:
        account = self._accounts.get(tenant)
        return None if account is None else account.sessions.get(name)

    def _find(self, name: str, tenant: str) -> Session:
        session = self._get(name, tenant)
        if session is None:
            raise NoSessionError("session", f"There is no session {name[:200]!r}.")
        return session

    def _make_new(self, name: str, tenant: str) -> Session:
        Handling(tenant, session=name)
        if self._get(name, tenant):
            raise _in_use(name)
        return self._make(name, tenant, self._clock())

    def _make(self, name: str, tenant: str, now: float) -> Session:
        if not self.num_sessions:
            self._leases.take_over()
        account = self._accounts.get(tenant)
        if account is not None and len(account.sessions) >= MAX_SESSIONS:
            known = account.sessions.values()
            self._forget(next((one for one in known if not one.busy), next(iter(known))))
            account = self._accounts.get(tenant)
        if account is None:
            limits = self._limits.get(tenant) or self._limits.get(ANY_TENANT)
            share = limits.lease_share if limits else 1.0
            most = [int(share * pool.num_blocks) for pool in self._kv.pools]
            account = self._accounts[tenant] = Account(tenant, most)
        session = account.sessions[name] = Session(name, account, now)
        self.num_sessions += 1
        return session

    def _forget(self, session: Session) -> None:
        self._end_pause(session, self._clock(), came_back=False)
        self._leases.release(session.lease)
        session.event = -1
        account = session.account
        del account.sessions[session.name]
        self.num_sessions -= 1
        if not account.sessions:
            del self._accounts[account.name]

    def _use(self, session: Session, now: float) -> None:
        session.used = now
        session.account.sessions.move_to_end(session.name)

    # ---- what they keep ---------------------------------------------------------------------

    def _keep(self, session: Session, path: Sequence[Node], more: bool) -> None:
        """more: besides another answer to the same turn."""
        session.path = list(path)
        session.num_tokens = sum(node.num_tokens for node in path)
        self._leases.hold(session.lease, self._kv.to_return(path), more)
        self._leases.keep_to_budget(session.account.owner)
        self._bound_paths(session)

    def _bound_paths(self, used: Session) -> None:
        """Names of contents that are long gone take memory, too: those not used for longest go."""
        sessions = used.account.sessions
        left = sum(len(one.path) for one in sessions.values()) - MOST_NODES
        if left > 0:
            for one in [one for one in sessions.values() if one is not used and not one.busy]:
                left -= len(one.path)
                self._forget(one)
                if left <= 0:
                    return

    def _paths(self) -> list[Sequence[Node]]:
        """What somebody may come back to, the least worth first."""
        expected = [one for one in self._all() if one.busy or one.pause is not None]
        return [one.path for one in sorted(expected, key=lambda one: one.lease.rank)]

    # ---- when they come back ----------------------------------------------------------------

    def _begin_pause(self, session: Session, now: float) -> None:
        if session.expects_s == 0:
            self._leases.release(session.lease)
        elif session.path:
            session.pause = self._pauses.begin(
                session.account.name, session.kind, now, session.expects_s
            )
            self._leases.place(session.lease, (False, self._pauses.worth(session.pause)))
        self._await_event(session)

    def _end_pause(self, session: Session, now: float, came_back: bool) -> None:
        if session.pause is not None:
            self._pauses.end(session.pause, now, came_back)
            session.pause = None

    def _await_event(self, session: Session) -> None:
        at = session.used + session.ttl_s
        if session.pause is not None:
            at = min(at, session.pause.bin_ends)
        session.event = next(self._numbers)
        heappush(self._events, (at, session.event, session))

    def _refresh(self) -> None:
        """Bring ranks up to date: each changes a few times for every doubling of a pause's age."""
        now, events = self._clock(), self._events
        for _ in range(_MOST_EVENTS):
            if not events or events[0][0] > now:
                break
            _, number, session = heappop(events)
            if number != session.event or session.busy:
                continue
            if now >= session.used + session.ttl_s:
                self._forget(session)
                continue
            if session.pause is not None:
                self._pauses.look(session.pause, now)
                worth = self._pauses.worth(session.pause)
                self._leases.place(session.lease, (False, worth))
            self._await_event(session)
        if len(events) > 2 * self.num_sessions + 64:
            events[:] = [one for one in events if one[1] == one[2].event]
            heapify(events)

    def _info(self, session: Session) -> SessionInfo:
        pause, now = session.pause, self._clock()
        left = None
        if pause is not None:
            expected = session.expects_s or self._pauses.expected_s(pause)
            left = pause.since + expected - now if expected < math.inf else None
        return SessionInfo(
            session.name,
            session.account.name,
            session.created,
            session.used,
            session.used + session.ttl_s,
            session.turns,
            session.busy,
            session.num_tokens,
            min(session.num_tokens, len(session.lease.nodes[0]) * self._kv.block_size),
            left,
        )


def _in_use(name: str) -> InputError:
    return InputError("id", f"There is a session {name[:200]!r} already; choose another name.")
