"""Leases: what sessions are expected to come back to, and in which order it yields all the same.

A lease holds nothing, it is a place in an order. What has none yields before it, so whoever runs gets
every block that is free. Whose lease it is, and for how long, is kv.sessions'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from elinvar.kv.pool import BlockPool
from elinvar.kv.tree import Node

Rank = tuple[bool, float]
"""Whether a turn of it waits or runs, and what it is worth among those alike; the lowest yields first."""


_SHORT = 64


class Order:
    """Leases by rank, in each group those that cover something there."""

    def __init__(self, num_groups: int) -> None:
        self._heaps: list[list[tuple[Rank, int, Lease]]] = [[] for _ in range(num_groups)]
        self._long = [_SHORT] * num_groups

    def place(self, lease: Lease) -> None:
        for group, heap in enumerate(self._heaps):
            if lease.nodes[group]:
                heappush(heap, (lease.rank, lease.entry, lease))
                if len(heap) > self._long[group]:
                    heap[:] = [one for one in heap if _is_good(one, group)]
                    heapify(heap)
                    self._long[group] = 2 * len(heap) + _SHORT

    def lowest(self, group: int) -> Lease | None:
        heap = self._heaps[group]
        while heap and not _is_good(heap[0], group):
            heappop(heap)
        return heap[0][2] if heap else None

    def check(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            for heap, nodes in zip(self._heaps, lease.nodes, strict=True):
                assert not nodes or (lease.rank, lease.entry, lease) in heap


def _is_good(entry: tuple[Rank, int, Lease], group: int) -> bool:
    return entry[1] == entry[2].entry and bool(entry[2].nodes[group])


class Owner:
    """A tenant: per group `most` nodes that its leases may cover."""

    def __init__(self, most: Sequence[int]) -> None:
        self.most = most
        self.charged = [0] * len(most)
        """Per group: what it leased first and is still leased, by it or by others who share it."""
        self.order = Order(len(most))


class Lease:
    __slots__ = ("entry", "nodes", "owner", "rank")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.nodes: list[dict[Node, None]] = [{} for _ in owner.most]
        """Per group: from the beginning to the end."""
        self.rank: Rank = (False, 0.0)
        self.entry = -1
        """Number of its last entry in the orders, which may hold older ones."""


class Leases:
    """refresh: called before one must yield, so that ranks are those of now."""

    def __init__(self, pools: Sequence[BlockPool], refresh: Callable[[], None]) -> None:
        self._pools = pools
        self._refresh = refresh
        self._order = Order(len(pools))
        self._entries = count()
        # Who pays for a node: the first to lease it, as long as anybody does.
        self._payers: list[dict[Node, Owner]] = [{} for _ in pools]

    def take_over(self) -> None:
        """Pools ask here from now on what to give up."""
        for pool in self._pools:
            pool.choose = self._choose(pool)

    def hold(self, lease: Lease, needed: Sequence[Sequence[Node]], more: bool = False) -> None:
        """needed: per group the nodes that it covers from now on, besides what it had (`more`) or
        instead of it; that is then what nobody comes back to. Those without content are left out."""
        for group, nodes in enumerate(needed):
            old = lease.nodes[group]
            new = dict.fromkeys(node for node in nodes if node.blocks[group] >= 0)
            for node in new:
                if node not in old:
                    self._begin(lease, group, node)
            if more:
                old.update(new)
                continue
            lease.nodes[group] = new
            # Each goes before all others, so the last of them, which is the end, goes first.
            for node in old:
                if node not in new:
                    self._end(group, node, first=True)
        self.place(lease, lease.rank)

    def release(self, lease: Lease) -> None:
        """Nobody comes back to it."""
        self.hold(lease, [()] * len(self._pools))

    def place(self, lease: Lease, rank: Rank) -> None:
        """Give it this place among the others."""
        lease.rank = rank
        lease.entry = next(self._entries)
        self._order.place(lease)
        lease.owner.order.place(lease)

    def keep_to_budget(self, owner: Owner) -> None:
        """The lease of the lowest rank is cut from its end. What it covered counts as just used."""
        for group, most in enumerate(owner.most):
            # What others lease, too, may be left when none of its own is.
            while owner.charged[group] > most and (lease := owner.order.lowest(group)):
                self._shorten(lease, group)

    def _shorten(self, lease: Lease, group: int) -> None:
        node, _ = lease.nodes[group].popitem()
        self._end(group, node, first=False)

    def _begin(self, lease: Lease, group: int, node: Node) -> None:
        pool = self._pools[group]
        if node not in pool.leases:
            self._payers[group][node] = lease.owner
            lease.owner.charged[group] += 1
        pool.lease(node)

    def _end(self, group: int, node: Node, first: bool) -> None:
        if self._pools[group].end_lease(node, first):
            self._payers[group].pop(node).charged[group] -= 1

    def _choose(self, pool: BlockPool) -> Callable[[], int]:
        """The rule by which a pool gives blocks up: what no lease covers, least recently used; then
        from the lease of the lowest rank the end. What several cover goes with the last of them."""

        def choose() -> int:
            if not pool.cached:
                self._refresh()
            while not pool.cached:
                lease = self._order.lowest(pool.group)
                assert lease is not None, "a leased block of no lease"
                self._shorten(lease, pool.group)
            return next(iter(pool.cached))

        return choose

    def check(self, leases: Sequence[Lease]) -> None:
        """Assert all invariants, given all leases. For tests and for an idle engine."""
        self._order.check(leases)
        for group, pool in enumerate(self._pools):
            counts: dict[Node, int] = {}
            for lease in leases:
                for node in lease.nodes[group]:
                    counts[node] = counts.get(node, 0) + 1
            assert counts == pool.leases, "leases and nodes disagree"
            assert counts.keys() == self._payers[group].keys()
            for owner in {one.owner for one in leases}:
                paid = sum(payer is owner for payer in self._payers[group].values())
                assert owner.charged[group] == paid, "a tenant pays for what it did not lease"
                owner.order.check(one for one in leases if one.owner is owner)
