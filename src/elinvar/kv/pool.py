"""BlockPool: the blocks of one KV group. Owns reference counts and the free list, and which node of
the tree each block holds the content of.

A block is in exactly one of four states: held (reference count above 0), plain (free, its
content is worthless), cached (free, but its node can still be found until it is given out again) or
leased (the same, and a session is expected to come back to it: see kv.leases).
It knows nothing of sequences, tokens or windows; that is the manager's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from elinvar.kv.tree import Node, Tree


class BlockPool:
    """`num_blocks` blocks with ids 0 .. num_blocks - 1, of the tree's group `group`."""

    __slots__ = (
        "_nodes",
        "_plain",
        "_refs",
        "cached",
        "choose",
        "evicted",
        "group",
        "leased",
        "leases",
        "num_blocks",
        "tree",
    )

    def __init__(
        self,
        num_blocks: int,
        group: int,
        tree: Tree,
    ) -> None:
        self.num_blocks = num_blocks
        self.group = group
        self.tree = tree
        self.evicted: Callable[[int, Node], None] | None = None
        """Told before a cached block is given out again."""
        self.choose: Callable[[], int] | None = None
        """Which cached block to give up; None: the one freed longest ago."""
        self.cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks that hold a node without a lease, least recently freed first."""
        self.leased: set[int] = set()
        """Free blocks that hold one with a lease."""
        self.leases: dict[Node, int] = {}
        """How many leases a node has here, whether or not a block holds it."""
        self._refs = [0] * num_blocks
        self._nodes: list[Node | None] = [None] * num_blocks
        # A stack: the block freed last is given out first, so a light load touches little memory.
        self._plain = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._plain) + len(self.cached) + len(self.leased)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller saw that num_free suffices.

        Plain blocks go first; then a cached block loses its content.
        """
        refs, plain = self._refs, self._plain
        blocks = []
        for _ in range(count):
            block = plain.pop() if plain else self._evict()
            refs[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block = self.choose() if self.choose else next(iter(self.cached))
        del self.cached[block]
        node = self._nodes[block]
        assert node is not None
        if self.evicted:
            self.evicted(block, node)
        self.forget(block)
        return block

    def share(self, block: int) -> None:
        """One more reference to the block of a node."""
        if self._refs[block] == 0:
            self._unlist(block)
        self._refs[block] += 1

    def _unlist(self, block: int) -> None:
        """A free block with a node is so no more."""
        if block in self.leased:
            self.leased.remove(block)
        else:
            del self.cached[block]

    def free(self, block: int) -> None:
        """One reference less. With the last one the block is free, and cached if it has a node."""
        self._refs[block] -= 1
        if self._refs[block]:
            return
        node = self._nodes[block]
        if node is None:
            self._plain.append(block)
        elif node in self.leases:
            self.leased.add(block)
        else:
            self.cached[block] = None

    def publish(self, block: int, node: Node) -> None:
        """A held block holds the content of `node` from now on, and no more of another.

        Where another block holds it, this one stays as it is.
        """
        if node.blocks[self.group] < 0:
            self.forget(block)
            self._nodes[block] = node
            node.blocks[self.group] = block

    def forget(self, block: int) -> None:
        """A block can no longer be found: its holder will write to it."""
        node = self._nodes[block]
        if node is not None:
            self._nodes[block] = None
            node.blocks[self.group] = -1
            self.tree.prune(node)

    def drop(self, node: Node) -> None:
        """This node's content is worth less than any other. Nothing, where it is in use."""
        block = node.blocks[self.group]
        if block >= 0 and self._refs[block] == 0:
            self._unlist(block)
            self.forget(block)
            self._plain.append(block)

    def lease(self, node: Node) -> None:
        """One more session is expected to come back to this node."""
        self.leases[node] = self.leases.get(node, 0) + 1
        block = node.blocks[self.group]
        if block in self.cached:
            del self.cached[block]
            self.leased.add(block)

    def end_lease(self, node: Node, first: bool) -> bool:
        """One less; whether it was the last. Then its block, if it is free, is given up before all
        others that are cached (`first`), or after them."""
        if self.leases[node] > 1:
            self.leases[node] -= 1
            return False
        del self.leases[node]
        block = node.blocks[self.group]
        if block in self.leased:
            self.leased.remove(block)
            self.cached[block] = None
            if first:
                self.cached.move_to_end(block, last=False)
        return True

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def node(self, block: int) -> Node | None:
        return self._nodes[block]

    def check(self) -> None:
        """Assert all invariants. Linear in num_blocks: for tests and for an idle engine."""
        plain, cached = set(self._plain), {*self.cached, *self.leased}
        held = {block for block, count in enumerate(self._refs) if count > 0}
        assert min(self._refs, default=0) >= 0, "negative reference count"
        assert len(plain) == len(self._plain), "a block is twice in the free list"
        assert not (plain & cached or plain & held or cached & held), "a block in two states"
        assert len(plain) + len(cached) + len(held) == self.num_blocks, "a block in no state"
        assert not self.leased & set(self.cached), "a block is leased, and is not"
        assert all((self._nodes[b] in self.leases) == (b in self.leased) for b in cached)
        for block, node in enumerate(self._nodes):
            assert node is None or node.blocks[self.group] == block, "node and block disagree"
        assert all(self._nodes[block] is None for block in plain), "a plain block has a node"
        assert all(self._nodes[block] is not None for block in cached), "a cached block has none"
