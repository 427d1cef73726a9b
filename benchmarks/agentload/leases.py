"""Leases in the simulator: a session's path of blocks between its turns.

What no lease holds yields first; then the lease of the lowest worth gives its blocks from the end,
since a beginning is of use alone and may be shared. A shared block stays until its last lease gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from agentload.load import Session
from agentload.policies import Lease, Order
from agentload.simulate import Visit, Watcher
from elinvar.kv.below import key_of
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tree import Node, pack
from elinvar.sched.request import Request
from elinvar.sched.scheduler import Scheduler

HOST_FULL, HOST_LEFT = 0.97, 0.9
"""Shares of a host tier at which leases give up some of it, and that are kept then."""


class Leases(Watcher):
    """Keeps leases of a run's sessions and chooses victims by `order`. steers_host: in a host tier,
    too, which else gives up what was not used for longest."""

    def __init__(self, order: Order, steers_host: bool = False) -> None:
        self._order, self._steers_host = order, steers_host
        self._host: HostTier | None = None
        self._owners_below: Counter[bytes] = Counter()
        self._leases: dict[Session, Lease] = {}
        self._owners: Counter[bytes] = Counter()
        self._orphans: list[Node] = []
        """May be of no lease any more."""
        self._preemptions = 0
        self._sorted_at = -1.0
        self._by_worth: list[Lease] = []
        """Those that may yield, the first one last; as of `_sorted_at`."""

    def begin(
        self,
        scheduler: Scheduler,
        now: Callable[[], float],
        host: HostTier | None,
        host_bytes: int,
    ) -> None:
        self._now, self._scheduler, self._pool = now, scheduler, scheduler.kv.pools[0]
        if self._steers_host and self._order.uses_leases:
            self._host, self._host_bytes = host, host_bytes
        self._pool.choose = self._choose if self._order.uses_leases else None

    def arrives(self, visit: Visit) -> None:
        """While its turn waits or runs, nothing of a session yields."""
        lease = self._leases.get(visit.session)
        if lease is None:
            lease = self._leases[visit.session] = Lease(visit.session)
        else:
            self._order.returned(lease, visit.came)
        lease.busy, lease.came = True, visit.came
        self._sorted_at = -1.0

    def ends(self, visit: Visit, due: tuple[float, ...]) -> None:
        lease = self._leases[visit.session]
        lease.busy = False
        lease.turn, lease.since, lease.due = visit.turn, self._now(), due
        self._owners.subtract(node.key for node in lease.path)
        self._orphans += lease.path
        lease.path = self._path(visit.request)
        self._owners.update(node.key for node in lease.path)
        self._order.paused(lease, lease.since)
        self._sorted_at = -1.0
        self._owners_below.subtract(lease.below)
        lease.below = [key_of(node, 0) for node in lease.path]
        self._owners_below.update(lease.below)
        if self._host is not None and self._host.num_bytes > HOST_FULL * self._host_bytes:
            self._trim(self._host, int(HOST_LEFT * self._host_bytes))

    def _trim(self, host: HostTier, num_bytes: int) -> None:
        """Forget in host memory until so many bytes are left: what no lease holds, then leases."""
        held = {key for key, _ in host.contents()}
        for key in held:
            if self._owners_below[key] <= 0:
                host.forget(key)
        owners, now = Counter(self._owners_below), self._now()
        idle = [one for one in self._leases.values() if one.below and not one.busy]
        for lease in sorted(idle, key=lambda one: self._order.worth(one, now)):
            for key in reversed(lease.below):
                owners[key] -= 1
                if host.num_bytes <= num_bytes:
                    return
                if owners[key] <= 0 and key in held:
                    host.forget(key)

    def _path(self, request: Request) -> list[Node]:
        """What is cached of all that it computed."""
        tree, size = self._scheduler.kv.tree, self._scheduler.kv.block_size
        node: Node | None = tree.root(request.kv.root)
        tokens, path = request.token_ids[:-1], []
        for at in range(0, len(tokens), size):
            assert node is not None
            node = tree.child(node, pack(tokens[at : at + size]))
            if node is None:
                break
            path.append(node)
        return path

    def _choose(self) -> int:
        """The block that yields next; it is cached, and nobody uses it."""
        pool = self._pool
        if self._scheduler.num_preemptions != self._preemptions:
            self._preemptions = self._scheduler.num_preemptions
            self._orphans += [node for block in pool.cached if (node := pool.node(block))]
        while self._orphans:
            block = self._free_to_yield(self._orphans.pop())
            if block is not None:
                return block
        while leases := self._sorted():
            path = leases[-1].path
            while path:
                node = path.pop()
                self._owners[node.key] -= 1
                block = self._free_to_yield(node)
                if block is not None:
                    return block
            leases.pop()
        return next(iter(pool.cached))

    def _free_to_yield(self, node: Node) -> int | None:
        block = node.blocks[0]
        if block < 0 or self._owners[node.key] > 0 or self._pool.ref_count(block):
            return None
        return block

    def _sorted(self) -> list[Lease]:
        now = self._now()
        if now != self._sorted_at:
            self._sorted_at = now
            held = [one for one in self._leases.values() if one.path]
            idle = [one for one in held if not one.busy]
            idle.sort(key=lambda one: -self._order.worth(one, now))
            # Who waits comes back at once; if it must be, who came last, since he is served last.
            busy = sorted((one for one in held if one.busy), key=lambda one: one.came)
            self._by_worth = busy + idle
        return self._by_worth
