"""The invariants of blocks, sequences and nodes together, for tests and for an idle engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from elinvar.kv.match import Match
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import SequenceKV
from elinvar.kv.tree import Tree


def check_blocks(
    sequences: Sequence[SequenceKV], pools: Sequence[BlockPool], match: Match, states: Sequence[int]
) -> None:
    """Assert that each block is held as often as the tables of all sequences say. states: groups of
    recurrent states."""
    counts = [[0] * pool.num_blocks for pool in pools]
    for seq in sequences:
        assert {len(table) * match.block_size for table in seq.tables} == {seq.capacity}
        assert seq.num_published * match.block_size <= seq.capacity
        for group, table in enumerate(seq.tables):
            first = seq.first_held[group]
            assert all(block == -1 for block in table[:first]), "holds blocks out of sight"
            if group in match.full:
                assert first == 0 and (seq.kept or not seq.num_hidden), "lost blocks"
                gap = match.hidden(group, seq.kept, seq.capacity)[: seq.num_hidden]
                assert {table[i] for i in (*gap, *seq.dropped)} <= {-1}
                assert len(gap) == seq.num_hidden
                lost = {*gap, *seq.dropped}
                table = [block for i, block in enumerate(table) if i not in lost]
            for block in table[first:]:
                assert block >= 0 or group in states, "a block is missing"
                if block >= 0:
                    counts[group][block] += 1
    for pool, expected in zip(pools, counts, strict=True):
        pool.check()
        actual = [pool.ref_count(block) for block in range(pool.num_blocks)]
        assert actual == expected, "reference counts and tables disagree"


def check_nodes(sequences: Sequence[SequenceKV], tree: Tree) -> None:
    """Assert that each node is held by whom it says."""
    tree.check()
    held = Counter(id(node) for seq in sequences for node in seq.nodes)
    coming = Counter(id(n) for seq in sequences for n in seq.nodes[seq.num_published :])
    tails = Counter(id(seq.tail) for seq in sequences if seq.tail is not None)
    for node in tree.nodes():
        assert node.holders == held[id(node)] + tails[id(node)], "somebody holds it, or nobody"
        assert node.coming == coming[id(node)] + tails[id(node)], "nobody computes what comes"
