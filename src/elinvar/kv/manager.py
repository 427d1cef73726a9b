"""KVManager: which blocks every sequence holds, in each layer-kind group.

Owns the pools, the keys of block contents, prefix matching, and the rule by which sliding groups
give blocks back. It must not know requests, rows or budgets (the scheduler's) nor arrays (the
runner's). All groups have the same block size, so the tables of a sequence have one length; where a
group holds nothing its table has -1.
What is particular to groups of recurrent states is kv/states.py's.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from itertools import chain

from elinvar.base.config import KVSpec
from elinvar.base.digest import blake2b
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import Allocation, Prefix, SequenceKV
from elinvar.kv.states import WINDOW, States

NEVER = sys.maxsize


class KVManager:
    """Block accounting over groups `specs` with `num_blocks[g]` blocks each.

    namespace: whatever the cached contents depend on besides the tokens (the weights' version);
    equal tokens in different namespaces never share.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        num_blocks: Sequence[int],
        prefix_cache: bool = True,
        namespace: str = "",
    ) -> None:
        self.block_size = specs[0].block_size
        self.prefix_cache = prefix_cache
        self.pools = [BlockPool(n) for n in num_blocks]
        self.windows = [WINDOW if spec.state else spec.window for spec in specs]
        self._states = States(specs, self.pools, prefix_cache)
        self._paged = [g for g, spec in enumerate(specs) if not spec.state]
        self._full = [g for g, w in enumerate(self.windows) if w is None]
        self._sliding = [(g, w) for g, w in enumerate(self.windows) if w is not None]
        self.use_namespace(namespace)
        self._pack = struct.Struct(f"<{self.block_size}I").pack
        self.max_sequence = min(self._alone(g) for g in range(len(specs)))
        """Most tokens that one sequence, alone, can have in blocks."""

    def use_namespace(self, namespace: str) -> None:
        """From now on nothing is found that was cached in another one; its blocks are given out
        again as they are needed. No sequence may be alive: they remember their keys."""
        self._root = blake2b(namespace.encode(), digest_size=32).digest()

    def new_sequence(
        self, namespace: bytes = b"", kept: tuple[int, int] | None = None
    ) -> SequenceKV:
        """namespace: what this sequence's contents depend on besides tokens and the manager's own.
        kept: as in SequenceKV."""
        seq = SequenceKV([[] for _ in self.pools], [0] * len(self.pools), kept=kept)
        seq.root = self._root + namespace
        self._set_next_event(seq)
        return seq

    # ---- prefix reuse -----------------------------------------------------------------------

    def find_prefix(self, seq: SequenceKV, token_ids: Sequence[int]) -> Prefix:
        """The longest cached prefix of `token_ids` that every group can serve.

        It ends on a block border and leaves at least one token to compute. Every group needs the
        blocks that the first query after the prefix sees in it. Changes nothing but the memo of keys
        in `seq`.
        """
        size = self.block_size
        count = (len(token_ids) - 1) // size if self.prefix_cache else 0
        for group in self._full if seq.kept is None else ():
            hits, find = 0, self.pools[group].find
            while hits < count and find(self._key(seq, token_ids, hits)) is not None:
                hits += 1
            count = hits
        shared = count * size if self._full and seq.kept is None else 0
        with_gaps = [group for group, _ in self._sliding] + (self._full if seq.kept else [])
        if count and with_gaps:
            self._key(seq, token_ids, count - 1)
            before = -1
            # A prefix shortened for one group may end where another has a gap: until it settles.
            while count != before:
                before = count
                for group in with_gaps:
                    count = self._hits(group, seq, count)
        blocks = [self._hit_blocks(group, seq, count) for group in range(len(self.pools))]
        revived = [
            sum(block >= 0 and pool.ref_count(block) == 0 for block in row)
            for pool, row in zip(self.pools, blocks, strict=True)
        ]
        marks = self._states.marks(count * size, shared, len(token_ids))
        return Prefix(count * size, blocks, revived, marks)

    def _hits(self, group: int, seq: SequenceKV, count: int) -> int:
        # Walks down from the end; a gap at block i means that the prefix can only end at i, so
        # each block that is not always seen is looked up once.
        find, keys = self.pools[group].find, seq.keys
        while count:
            hidden = self._hidden(group, seq, count * self.block_size)
            seen = chain(range(count - 1, hidden.stop - 1, -1), range(hidden.start))
            gap = next((i for i in seen if find(keys[i]) is None), -1)
            if gap < 0:
                return count
            count = gap
        return 0

    def _hit_blocks(self, group: int, seq: SequenceKV, count: int) -> list[int]:
        hidden = self._hidden(group, seq, count * self.block_size)
        find, keys = self.pools[group].find, seq.keys[:count]

        def found(some: list[bytes]) -> list[int]:
            return [block for key in some if (block := find(key)) is not None]

        return found(keys[: hidden.start]) + [-1] * len(hidden) + found(keys[hidden.stop :])

    def _key(self, seq: SequenceKV, token_ids: Sequence[int], index: int) -> bytes:
        """Key of block `index`: 256-bit BLAKE2b over the previous block's key and the tokens, so
        that equal keys mean equal sequences up to the block's end."""
        keys, size = seq.keys, self.block_size
        while len(keys) <= index:
            at = len(keys) * size
            parent = keys[-1] if keys else seq.root
            data = parent + self._pack(*token_ids[at : at + size])
            keys.append(blake2b(data, digest_size=32).digest())
        return keys[index]

    # ---- allocation: prepare changes nothing, apply cannot fail -----------------------------

    def prepare(
        self, seq: SequenceKV, start: int, end: int, prefix: Prefix | None = None
    ) -> Allocation | None:
        """Find room for positions start .. end - 1, or as many of them as blocks are free for.

        None when there is none for `start` itself. `prefix` is given for a sequence that holds
        nothing and starts with it. It may end sooner, to leave a snapshot.
        """
        free = [pool.num_free for pool in self.pools]
        held, marks = len(seq.tables[0]), seq.marks
        if prefix is not None:
            held, marks = prefix.num_tokens // self.block_size, prefix.marks
            free = [a - b for a, b in zip(free, prefix.num_revived, strict=True)]
        room = min([free[group] for group in self._paged], default=NEVER)
        end = self._states.cut(marks, start, min(end, (held + room) * self.block_size))
        if end <= start:
            return None
        num_blocks = max(0, -(-end // self.block_size) - held)
        if num_blocks and not self._states.can_go_on(seq, prefix, free):
            return None
        return Allocation(seq, end, num_blocks, prefix)

    def apply(self, allocation: Allocation) -> list[list[int]]:
        """Take what `prepare` found; returns the new blocks of each group."""
        seq = allocation.seq
        if allocation.prefix is not None:
            self._take_prefix(seq, allocation.prefix)
        new = []
        for group, (pool, table) in enumerate(zip(self.pools, seq.tables, strict=True)):
            if group in self._states.groups:
                blocks = self._states.go_on(group, seq, allocation.num_blocks)
            else:
                blocks = pool.allocate(allocation.num_blocks)
            table += blocks
            new.append(blocks)
        seq.capacity = len(seq.tables[0]) * self.block_size
        return new

    def _take_prefix(self, seq: SequenceKV, prefix: Prefix) -> None:
        seq.num_published = prefix.num_tokens // self.block_size
        seq.marks = prefix.marks
        for group, (pool, blocks) in enumerate(zip(self.pools, prefix.blocks, strict=True)):
            seq.tables[group] = list(blocks)
            seq.num_hidden[group] = blocks.count(-1)
            for block in blocks:
                if block >= 0:
                    pool.share(block)
        self._set_next_event(seq)

    def advance(self, seq: SequenceKV, token_ids: Sequence[int], num_computed: int) -> None:
        """A step was committed: publish the blocks it filled, free those no query sees any more.

        Needed only when num_computed reached seq.next_event.
        """
        if self.prefix_cache:
            for index in range(seq.num_published, num_computed // self.block_size):
                key = self._key(seq, token_ids, index)
                for pool, table in zip(self.pools, seq.tables, strict=True):
                    if table[index] >= 0:
                        pool.publish(table[index], key)
                seq.num_published = index + 1
            if num_computed % self.block_size == 0:
                self._states.left(seq, num_computed)
        for group, (pool, table) in enumerate(zip(self.pools, seq.tables, strict=True)):
            hidden = self._hidden(group, seq, num_computed)[: len(table)]
            for index in hidden[seq.num_hidden[group] :]:
                if table[index] >= 0:
                    pool.free(table[index])
                    table[index] = -1
            seq.num_hidden[group] = max(len(hidden), seq.num_hidden[group])
        self._set_next_event(seq)

    def free(self, seq: SequenceKV) -> None:
        """Give everything back. Ends first: they are then evicted first, so that what stays
        cached are the beginnings, which other sequences are likelier to share."""
        for group, pool in enumerate(self.pools):
            for block in reversed(seq.tables[group]):
                if block >= 0:
                    pool.free(block)
            seq.tables[group] = []
            seq.num_hidden[group] = 0
        seq.capacity = seq.num_published = 0
        seq.marks, seq.tail = (), -1
        self._set_next_event(seq)

    def _set_next_event(self, seq: SequenceKV) -> None:
        size = self.block_size
        event = (seq.num_published + 1) * size if self.prefix_cache else NEVER
        for group, window in self._sliding:
            # The first held block is out of sight once the query after it sees only later ones.
            event = min(event, (seq.num_hidden[group] + 1) * size + window - 1)
        if seq.kept is not None:
            for group in self._full:
                event = min(event, (seq.num_hidden[group] + sum(seq.kept) + 1) * size)
        seq.next_event = event

    def _hidden(self, group: int, seq: SequenceKV, position: int) -> range:
        """Indices of the blocks that a query at `position` does not see any more."""
        if (window := self.windows[group]) is not None:
            return range(max(0, position - window + 1) // self.block_size)
        if seq.kept is None:
            return range(0)
        num_first, num_last = seq.kept
        return range(num_first, max(num_first, position // self.block_size - num_last))

    # ---- admission --------------------------------------------------------------------------

    def _span(self, num_tokens: int) -> int:
        """Most blocks that `num_tokens` successive positions can touch."""
        return (num_tokens - 2) // self.block_size + 2

    def _alone(self, group: int) -> int:
        window, num_blocks = self.windows[group], self.pools[group].num_blocks
        if group in self._states.groups:
            return NEVER if num_blocks else 0
        if window is not None and num_blocks >= self._span(window):
            return NEVER
        return num_blocks * self.block_size

    def longest(self, kept: tuple[int, int] | None) -> int:
        """Most tokens that one sequence, alone, can have in blocks. kept: as in SequenceKV."""
        if kept is None:
            return self.max_sequence
        room = sum(kept) + 1
        return min(
            NEVER if w is None and self.pools[group].num_blocks >= room else self._alone(group)
            for group, w in enumerate(self.windows)
        )

    def to_come(
        self,
        held: Sequence[int],
        reach: int,
        num_tokens: int,
        chunk: int,
        kept: tuple[int, int] | None = None,
    ) -> list[int]:
        """Per group: blocks that a sequence will still take until `num_tokens` are computed in
        steps of at most `chunk`, when it holds `held` and its tables have `reach` entries. Of
        states, none but its own: it can give up its snapshots."""
        left = max(0, -(-num_tokens // self.block_size) - reach)
        most = NEVER if kept is None else sum(kept) + self._span(chunk)
        need = [
            min(left, max(0, (most if window is None else self._span(window - 1 + chunk)) - have))
            for window, have in zip(self.windows, held, strict=True)
        ]
        for group in self._states.groups:
            need[group] = 0
        return need

    def to_come_for(self, seq: SequenceKV, num_tokens: int, chunk: int) -> list[int]:
        """`to_come` of a sequence that has begun."""
        reach = len(seq.tables[0])
        held = [reach - hidden for hidden in seq.num_hidden]
        return self.to_come(held, reach, num_tokens, chunk, seq.kept)

    def spare(self, num_sequences: int) -> list[int]:
        """Per group: blocks that so many running sequences should find beyond those `to_come`."""
        return [num_sequences if group in self._paged else 0 for group in range(len(self.pools))]

    def can_admit(
        self,
        prefix: Prefix,
        num_tokens: int,
        chunk: int,
        reserve: list[int],
        kept: tuple[int, int] | None = None,
    ) -> bool:
        """Whether a sequence that starts with `prefix` can compute all its `num_tokens` and leave
        `reserve` blocks of each group to those already running."""
        held = [len(blocks) - blocks.count(-1) for blocks in prefix.blocks]
        need = self.to_come(held, len(prefix.blocks[0]), num_tokens, chunk, kept)
        for group in self._states.groups:
            need[group] = 1
        return all(
            more + revived + kept <= pool.num_free
            for pool, more, revived, kept in zip(
                self.pools, need, prefix.num_revived, reserve, strict=True
            )
        )

    @property
    def usage(self) -> float:
        """Share of blocks held by running sequences, of the group that is fullest."""
        return max(1.0 - pool.num_free / pool.num_blocks for pool in self.pools)

    def check(self, sequences: Iterable[SequenceKV]) -> None:
        """Assert all invariants, given every sequence that holds blocks."""
        counts = [[0] * pool.num_blocks for pool in self.pools]
        for seq in sequences:
            assert {len(table) * self.block_size for table in seq.tables} == {seq.capacity}
            assert seq.num_published * self.block_size <= seq.capacity
            for group, table in enumerate(seq.tables):
                count, kept = seq.num_hidden[group], seq.kept
                first = kept[0] if kept is not None and self.windows[group] is None else 0
                assert all(block == -1 for block in table[first : first + count]), "holds too many"
                assert self.windows[group] is not None or kept or not count, "lost blocks"
                for block in table[:first] + table[first + count :]:
                    assert block >= 0 or group in self._states.groups, "a block is missing"
                    if block >= 0:
                        counts[group][block] += 1
        for pool, expected in zip(self.pools, counts, strict=True):
            pool.check()
            actual = [pool.ref_count(block) for block in range(pool.num_blocks)]
            assert actual == expected, "reference counts and tables disagree"
