"""Publish: what a sequence says others may find, or may wait for.

Owns who holds which node of the tree: a sequence announces what it is about to compute, publishes the
blocks that it filled, and lets go of all of it at its end. Nothing is found that was not committed.
"""

from __future__ import annotations

from collections.abc import Sequence

from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import Prefix, SequenceKV, first_of
from elinvar.kv.states import States
from elinvar.kv.tree import Node, Tree, pack


class Publish:
    def __init__(
        self, block_size: int, pools: Sequence[BlockPool], states: States, tree: Tree
    ) -> None:
        self._size, self._pools, self._states, self._tree = block_size, pools, states, tree

    def announce(self, seq: SequenceKV, prefix: Prefix) -> None:
        """Say what this sequence is about to compute, so that others may wait for it."""
        tokens, size = first_of(prefix.token_ids, seq.shared), self._size
        seq.num_first = len(tokens)
        seq.num_known = len(tokens) // size
        seq.nodes = []
        for index in range(seq.num_known):
            node = self._extend(seq, tokens, index)
            node.coming += index >= seq.num_published
        if rest := tokens[seq.num_known * size :]:
            seq.tail = self._hold(seq, seq.num_known, pack(rest))
            seq.tail.coming += 1

    def advance(self, seq: SequenceKV, token_ids: Sequence[int], num_computed: int) -> None:
        """Publish the blocks that a committed step filled."""
        if num_computed > seq.shared:
            return
        for index in range(seq.num_published, num_computed // self._size):
            known = index < len(seq.nodes)
            node = seq.nodes[index] if known else self._extend(seq, token_ids, index)
            node.coming -= known
            self._publish(seq, node, index)
            seq.num_published = index + 1
        if seq.tail is not None and num_computed >= seq.num_first:
            tail, seq.tail = seq.tail, None
            tail.coming -= 1
            if seq.num_published == seq.num_known and not self._states.groups:
                # Others may begin in the middle of a block that this sequence goes on writing.
                self._publish(seq, tail, seq.num_known)
            self._let_go(tail)
        if num_computed % self._size == 0:
            self._states.left(seq, num_computed)

    def end(self, seq: SequenceKV, token_ids: Sequence[int], num_computed: int) -> Node | None:
        """Publish what lies in its last block, which nobody writes any more."""
        index, rest = divmod(num_computed, self._size)
        if not rest or index != seq.num_published or num_computed > seq.shared:
            return None
        end = self._hold(seq, index, pack(token_ids[num_computed - rest : num_computed]))
        self._publish(seq, end, index)
        self._states.replace(seq)
        self._let_go(end)
        return end

    def leave(self, seq: SequenceKV) -> None:
        """Nothing is to come of it any more, and it holds no node."""
        if seq.tail is not None:
            seq.tail.coming -= 1
            self._let_go(seq.tail)
        for index in range(len(seq.nodes) - 1, -1, -1):
            seq.nodes[index].coming -= index >= seq.num_published
            self._let_go(seq.nodes[index])
        seq.nodes, seq.tail = [], None

    def _extend(self, seq: SequenceKV, token_ids: Sequence[int], index: int) -> Node:
        at = index * self._size
        node = self._hold(seq, index, pack(token_ids[at : at + self._size]))
        seq.nodes.append(node)
        return node

    def _hold(self, seq: SequenceKV, index: int, tokens: bytes) -> Node:
        parent = seq.nodes[index - 1] if index else self._tree.root(seq.root)
        node = self._tree.grow(parent, tokens)
        node.holders += 1
        return node

    def _publish(self, seq: SequenceKV, node: Node, index: int) -> None:
        for pool, table in zip(self._pools, seq.tables, strict=True):
            if table[index] >= 0:
                pool.publish(table[index], node)
        old = self._tree.superseded(node)
        if old is not None and not self._states.groups:
            for pool, block in zip(self._pools, node.blocks, strict=True):
                if block >= 0:
                    pool.drop(old)

    def _let_go(self, node: Node) -> None:
        node.holders -= 1
        self._tree.prune(node)
