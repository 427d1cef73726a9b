"""Leases: what sessions are expected to come back to, and in which order it yields all the same.

A lease holds nothing, it is a place in an order. What has none yields before it, so whoever runs gets
every block that is free. Whose lease it is, and for how long, is kv.sessions'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from elinvar.kv.pool import BlockPool
from elinvar.kv.tree import Node

Rank = tuple[bool, float]
"""Whether a turn of it waits or runs, and what it is worth among those alike; the lowest yields first."""


class Lease:
    __slots__ = ("charged", "entry", "nodes", "rank")

    def __init__(self, charged: list[int]) -> None:
        self.charged = charged
        """Per group: nodes that its tenant has leases on."""
        self.nodes: list[dict[Node, None]] = [{} for _ in charged]
        """Per group: from the beginning to the end."""
        self.rank: Rank = (False, 0.0)
        self.entry = -1
        """Number of its entry in the heaps, which may hold older ones."""


class Leases:
    """refresh: called before one must yield, so that ranks are those of now."""

    def __init__(self, pools: Sequence[BlockPool], refresh: Callable[[], None]) -> None:
        self._pools = pools
        self._refresh = refresh
        self._heaps: list[list[tuple[Rank, int, Lease]]] = [[] for _ in pools]
        self._entries = count()
        # Who pays for a node: the first to lease it, as long as anybody does.
        self._payers: list[dict[Node, list[int]]] = [{} for _ in pools]
        for pool in pools:
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
        for heap, nodes in zip(self._heaps, lease.nodes, strict=True):
            if nodes:
                heappush(heap, (rank, lease.entry, lease))

    def shorten(self, lease: Lease, group: int) -> bool:
        """Give up its last node in a group; False: it has none. The content counts as just used."""
        if not lease.nodes[group]:
            return False
        node, _ = lease.nodes[group].popitem()
        self._end(group, node, first=False)
        return True

    def tidy(self, num_leases: int) -> None:
        """Forget old entries where they are more than the leases."""
        for heap in self._heaps:
            if len(heap) > 2 * num_leases + 64:
                heap[:] = [one for one in heap if one[1] == one[2].entry]
                heapify(heap)

    def _begin(self, lease: Lease, group: int, node: Node) -> None:
        pool = self._pools[group]
        if node not in pool.leases:
            self._payers[group][node] = lease.charged
            lease.charged[group] += 1
        pool.lease(node)

    def _end(self, group: int, node: Node, first: bool) -> None:
        if self._pools[group].end_lease(node, first):
            self._payers[group].pop(node)[group] -= 1

    def _choose(self, pool: BlockPool) -> Callable[[], int]:
        """The rule by which a pool gives blocks up: what no lease covers, least recently used; then
        from the lease of the lowest rank the end. What several cover goes with the last of them."""
        group, heap = pool.group, self._heaps[pool.group]

        def choose() -> int:
            if not pool.cached:
                self._refresh()
            while not pool.cached:
                _, entry, lease = heap[0]
                if entry != lease.entry or not self.shorten(lease, group):
                    heappop(heap)
            return next(iter(pool.cached))

        return choose

    def check(self, leases: Sequence[Lease]) -> None:
        """Assert all invariants, given all leases. For tests and for an idle engine."""
        for group, (pool, heap) in enumerate(zip(self._pools, self._heaps, strict=True)):
            counts: dict[Node, int] = {}
            for lease in leases:
                for node in lease.nodes[group]:
                    counts[node] = counts.get(node, 0) + 1
                entries = [one for one in heap if one[1] == lease.entry]
                assert not lease.nodes[group] or entries == [(lease.rank, lease.entry, lease)]
            assert counts == pool.leases, "leases and nodes disagree"
            assert counts.keys() == self._payers[group].keys()
            for charged in {id(one.charged): one.charged for one in leases}.values():
                paid = sum(payer is charged for payer in self._payers[group].values())
                assert charged[group] == paid, "a tenant pays for what it does not lease"
