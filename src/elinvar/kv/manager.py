"""KVManager: which blocks every sequence holds, in each layer-kind group.

Owns the pools, the tree of what is cached, and the rule by which sliding groups give blocks back. It
must not know requests, rows or budgets (the scheduler's) nor arrays (the runner's). All groups have
the same block size, so the tables of a sequence have one length; where a group holds nothing its
table has -1.
How a prefix is found is kv/match.py's; what is particular to groups of recurrent states is
kv/states.py's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from elinvar.base.config import KVSpec
from elinvar.base.plan import BlockCopy, BlockMove
from elinvar.kv.match import Kept, Match
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import LOAD, Allocation, Lookup, Prefix, SequenceKV, Taken
from elinvar.kv.states import WINDOW, States
from elinvar.kv.tree import Node, Tree, key_of, pack

if TYPE_CHECKING:
    from elinvar.kv.below import Below
    from elinvar.kv.tiers.hierarchy import Tiers

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
        self.tree = Tree(len(specs))
        self.pools = [BlockPool(count, group, self.tree) for group, count in enumerate(num_blocks)]
        self.windows = [WINDOW if spec.state else spec.window for spec in specs]
        self._states = States(specs, self.pools, prefix_cache)
        self._match = Match(self.block_size, self.windows, self._states.groups, self.tree)
        self._paged = [g for g, spec in enumerate(specs) if not spec.state]
        self._sliding = [(g, w) for g, w in enumerate(self.windows) if w is not None]
        self._full = [g for g, w in enumerate(self.windows) if w is None]
        self._below: Below | None = None
        self._block_bytes = [spec.block_bytes for spec in specs]
        self.use_namespace(namespace)
        self.max_sequence = min(self._alone(g) for g in range(len(specs)))
        """Most tokens that one sequence, alone, can have in blocks."""

    def use_namespace(self, namespace: str) -> None:
        """From now on nothing is found that was cached in another one; its blocks are given out
        again first. No sequence may be alive: they remember theirs."""
        self._namespace = namespace.encode()
        for node in list(self.tree.nodes()):
            for pool in self.pools:
                pool.drop(node)
        if self._below is not None:
            self._below.forget_all()

    def new_sequence(self, namespace: bytes = b"", kept: Kept | None = None) -> SequenceKV:
        """namespace: what this sequence's contents depend on besides tokens and the manager's own.
        kept: as in SequenceKV."""
        # The length says where one ends: no pair of namespaces reads as another.
        root = len(self._namespace).to_bytes(4) + self._namespace + namespace
        seq = SequenceKV([[] for _ in self.pools], [0] * len(self.pools), root, kept=kept)
        self._set_next_event(seq)
        return seq

    # ---- prefix reuse -----------------------------------------------------------------------

    def find_prefix(self, seq: SequenceKV, token_ids: Sequence[int]) -> Prefix:
        """The longest cached prefix of `token_ids` that every group can serve, to the token.

        It leaves at least one token to compute. Each group needs the blocks that the first query
        after the prefix sees: a full one all of them, but where a sequence forgets. Changes nothing.
        """
        if not self.prefix_cache:
            counts = [0] * len(self.pools)
            return Prefix(0, token_ids, [], [[] for _ in self.pools], counts, kept=seq.kept)
        found = self._match.longest(seq.root, token_ids, seq.kept)
        pending = False
        if self._below is not None:
            seq.lookup = seq.lookup or Lookup()
            more = self._below.search(seq.lookup, seq.root, token_ids, found)
            found, pending = more or found, more is None
        path, end = found.path, found.num_tokens
        blocks = []
        for group in range(len(self.pools)):
            hidden, held = self._match.unseen(group, found), [node.blocks[group] for node in path]
            row = [block if block >= 0 else LOAD for block in held]
            row[hidden.start : hidden.stop] = [-1] * len(hidden)
            blocks.append(row)
        taken = [
            sum(block == LOAD or (block >= 0 and pool.ref_count(block) == 0) for block in row)
            for pool, row in zip(self.pools, blocks, strict=True)
        ]
        marks = self._states.marks(end, found.num_shared, len(token_ids))
        rest = found.tail, marks, found.coming, pending, seq.kept
        return Prefix(end, token_ids, path, blocks, taken, *rest)

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
            held, marks = len(prefix.path), prefix.marks
            free = [a - b for a, b in zip(free, prefix.num_taken, strict=True)]
        room = min([free[group] for group in self._paged], default=NEVER)
        end = self._states.cut(marks, start, min(end, (held + room) * self.block_size))
        if end <= start:
            return None
        num_blocks = max(0, -(-end // self.block_size) - held)
        if num_blocks and not self._states.can_go_on(seq, prefix, free):
            return None
        return Allocation(seq, end, num_blocks, prefix)

    def apply(self, allocation: Allocation) -> Taken:
        """Take what `prepare` found."""
        seq, prefix, count = allocation.seq, allocation.prefix, allocation.num_blocks
        taken = Taken([], [])
        if prefix is not None:
            self._take_prefix(seq, prefix, taken)
        # Looked up before anything is given out: what is copied may be what is given up for it.
        tail = prefix.tail.blocks[:] if prefix is not None and prefix.tail else None
        for group, (pool, table) in enumerate(zip(self.pools, seq.tables, strict=True)):
            entries = None
            if group not in self._states.groups:
                blocks = pool.allocate(count)
            elif tail is None:
                blocks = self._states.go_on(group, seq, count)
            else:
                blocks = self._states.go_on_from_copy(group, seq, count)
                entries = [-1] * (count - 1) + blocks[-1:]
            if tail is not None and tail[group] >= 0:
                taken.copies.append(BlockCopy(group, tail[group], blocks[0]))
            elif prefix is not None and prefix.tail is not None:
                taken.loads.append(BlockMove(group, blocks[0], key_of(prefix.tail, group)))
            table += blocks if entries is None else entries
            taken.blocks.append(blocks)
        seq.capacity = len(seq.tables[0]) * self.block_size
        return taken

    def _take_prefix(self, seq: SequenceKV, prefix: Prefix, taken: Taken) -> None:
        seq.marks = prefix.marks
        seq.tables = [list(blocks) for blocks in prefix.blocks]
        hidden = [blocks.count(-1) for blocks in prefix.blocks]
        seq.num_hidden = max([hidden[group] for group in self._full], default=0)
        for group, _ in self._sliding:
            seq.first_held[group] = hidden[group]
        for pool, table in zip(self.pools, seq.tables, strict=True):
            for block in table:
                if block >= 0:
                    pool.share(block)
        seq.num_published = len(prefix.path)
        for group, table in enumerate(seq.tables):
            for index, block in enumerate(table if LOAD in table else ()):
                if block == LOAD:
                    [table[index]] = self.pools[group].allocate(1)
                    key = key_of(prefix.path[index], group)
                    taken.loads.append(BlockMove(group, table[index], key))
                    seq.num_published = min(seq.num_published, index)
        taken.start = [list(table) for table in seq.tables]
        if not (taken.loads or prefix.is_below):
            self.end_lookup(seq)  # nothing of what was fetched for it is waited for any more
        if self.prefix_cache:
            self._announce(seq, prefix)
        self._set_next_event(seq)

    # ---- what others can find ---------------------------------------------------------------

    def _announce(self, seq: SequenceKV, prefix: Prefix) -> None:
        """Say what this sequence is about to compute, so that others may wait for it."""
        tokens, size = prefix.token_ids, self.block_size
        seq.num_first = len(tokens)
        seq.num_known = len(tokens) // size
        seq.nodes = []
        for index in range(seq.num_known):
            node = self._extend(seq, tokens, index)
            node.coming += index >= seq.num_published
        if rest := tokens[seq.num_known * size :]:
            seq.tail = self._hold(seq, seq.num_known, pack(rest))
            seq.tail.coming += 1

    def _extend(self, seq: SequenceKV, token_ids: Sequence[int], index: int) -> Node:
        at = index * self.block_size
        node = self._hold(seq, index, pack(token_ids[at : at + self.block_size]))
        seq.nodes.append(node)
        return node

    def _hold(self, seq: SequenceKV, index: int, tokens: bytes) -> Node:
        parent = seq.nodes[index - 1] if index else self.tree.root(seq.root)
        node = self.tree.grow(parent, tokens)
        node.holders += 1
        return node

    def _publish(self, seq: SequenceKV, node: Node, index: int) -> None:
        for pool, table in zip(self.pools, seq.tables, strict=True):
            if table[index] >= 0:
                pool.publish(table[index], node)
        old = self.tree.superseded(node)
        if old is not None and not self._states.groups:
            for pool, block in zip(self.pools, node.blocks, strict=True):
                if block >= 0:
                    pool.drop(old)

    def _let_go(self, node: Node) -> None:
        node.holders -= 1
        self.tree.prune(node)

    def advance(self, seq: SequenceKV, token_ids: Sequence[int], num_computed: int) -> None:
        """A step was committed: publish the blocks it filled, free those no query sees any more.

        Needed only when num_computed reached seq.next_event.
        """
        if self.prefix_cache:
            self._publish_all(seq, token_ids, num_computed)
        for group, _ in self._sliding:
            table, pool = seq.tables[group], self.pools[group]
            first = min(len(self._match.hidden(group, None, num_computed)), len(table))
            for index in range(seq.first_held[group], first):
                if table[index] >= 0:
                    self._free(pool, table[index])
                    table[index] = -1
            seq.first_held[group] = max(first, seq.first_held[group])
        if seq.kept is not None:
            self._forget(seq, num_computed)
        self._set_next_event(seq)

    def _forget(self, seq: SequenceKV, num_computed: int) -> None:
        """Give back what lies between the first and the last blocks that it keeps."""
        count = seq.num_hidden
        for group in self._full:
            table = seq.tables[group]
            hidden = self._match.hidden(group, seq.kept, num_computed)
            for index in hidden[seq.num_hidden :]:
                self._free(self.pools[group], table[index])
                table[index] = -1
            count = max(len(hidden), count)
        seq.num_hidden = count

    def _publish_all(self, seq: SequenceKV, token_ids: Sequence[int], num_computed: int) -> None:
        for index in range(seq.num_published, num_computed // self.block_size):
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
        if num_computed % self.block_size == 0:
            self._states.left(seq, num_computed)

    def free(
        self, seq: SequenceKV, token_ids: Sequence[int] = (), num_computed: int = 0
    ) -> list[Node]:
        """Give everything back. Ends first: they are then evicted first, so that what stays
        cached are the beginnings, which other sequences are likelier to share.

        num_computed: of `token_ids`, all that was computed, where that is known for certain: then
        what lies in the last block can be found, too. Returns what can be found of it now.
        """
        path = seq.nodes[: seq.num_published]
        index, rest = divmod(num_computed, self.block_size)
        if self.prefix_cache and rest and index == seq.num_published:
            end = self._hold(seq, index, pack(token_ids[num_computed - rest : num_computed]))
            self._publish(seq, end, index)
            self._states.replace(seq)
            self._let_go(end)
            path.append(end)
        for group, pool in enumerate(self.pools):
            for block in reversed(seq.tables[group][seq.first_held[group] :]):
                if block >= 0:
                    self._free(pool, block)
            seq.tables[group] = []
            seq.first_held[group] = 0
        seq.num_hidden = 0
        if seq.tail is not None:
            seq.tail.coming -= 1
            self._let_go(seq.tail)
        for index in range(len(seq.nodes) - 1, -1, -1):
            seq.nodes[index].coming -= index >= seq.num_published
            self._let_go(seq.nodes[index])
        seq.nodes, seq.tail = [], None
        self.end_lookup(seq)
        if seq.lookup is not None and not seq.lookup.failed:
            seq.lookup = None
        seq.capacity = seq.num_published = 0
        seq.marks, seq.snapshot = (), -1
        self._set_next_event(seq)
        return path

    def to_return(self, path: Sequence[Node]) -> list[Sequence[Node]]:
        """Per group: of the nodes of a sequence those whose contents its continuation needs."""
        end = sum(node.num_tokens for node in path)
        needed: list[Sequence[Node]] = []
        for group in range(len(self.pools)):
            if group in self._states.groups:
                last = (node for node in reversed(path) if node.blocks[group] >= 0)
                needed.append(list(islice(last, 1)))
            else:
                needed.append(path[self._match.hidden(group, None, end).stop :])
        return needed

    def _free(self, pool: BlockPool, block: int) -> None:
        pool.free(block)
        node = pool.node(block)
        if self._below is not None and node is not None and not pool.ref_count(block):
            self._below.freed(pool.group, block, node)

    # ---- below the provider's memory --------------------------------------------------------

    def use_tiers(self, tiers: Tiers, compute_s: Callable[[int, int], float]) -> None:
        """Contents are saved to `tiers` before they are given up, and found there. compute_s: seconds
        that computing the tokens from one position to another takes."""
        from elinvar.kv.below import Below

        self._below = Below(tiers, self.tree, self._match, self.pools, self._block_bytes)
        self._below.compute_s = compute_s

    def saves(self, is_idle: bool) -> list[BlockMove]:
        """What the step must save before it begins, or may when it has nothing else to do."""
        if self._below is None:
            return []
        if is_idle:
            self._below.save_some()
        return self._below.take_saves()

    @property
    def has_unsaved(self) -> bool:
        return self._below is not None and self._below.has_unsaved

    def where_found(self, seq: SequenceKV, prefix: Prefix, taken: Taken) -> dict[str, int]:
        """Tokens of its prefix by the place where they were found."""
        origins = seq.lookup.origins if seq.lookup else {}
        loaded = {move.key[:-1]: origins.get(move.key, "host") for move in taken.loads}
        found: Counter[str] = Counter()
        for node in prefix.path:
            found[loaded.get(node.key, "memory")] += self.block_size
        if prefix.tail is not None:
            rest = prefix.num_tokens % self.block_size
            found[loaded.get(prefix.tail.key, "memory")] += rest
        return found

    def places(self, path: Sequence[Node]) -> tuple[int, int]:
        """Tokens of these nodes whose contents are in memory, by a group that keeps every block
        where there is one; and of the others those known to be below."""
        group = self.windows.index(None) if None in self.windows else 0
        memory = sum(node.num_tokens for node in path if node.blocks[group] >= 0)
        others = [node for node in path if node.blocks[group] < 0]
        below = 0 if self._below is None else self._below.num_known(others, group)
        return memory, below

    def trim_below(self, paths: Callable[[], list[Sequence[Node]]]) -> None:
        """Where host memory is nearly full, what is of none of these paths goes first, then the first
        of them from its end, and so on."""
        if self._below is not None:
            self._below.trim(paths)

    def give_up_lookup(self, seq: SequenceKV) -> None:
        """It looks for nothing below any more."""
        seq.lookup = Lookup(over=True, failed=True)

    def is_searching(self, seq: SequenceKV) -> bool:
        """What it looks for below is not known yet, or on its way."""
        lookup = seq.lookup
        return lookup is not None and lookup.ticket is not None and not lookup.ticket.done

    def end_lookup(self, seq: SequenceKV) -> None:
        """It has what it looked for, or does not need it any more."""
        if seq.lookup is not None:
            seq.lookup.end()

    def _set_next_event(self, seq: SequenceKV) -> None:
        size = self.block_size
        event = (seq.num_published + 1) * size if self.prefix_cache else NEVER
        if seq.tail is not None:
            event = min(event, seq.num_first)
        for group, window in self._sliding:
            # The first held block is out of sight once the query after it sees only later ones.
            event = min(event, (seq.first_held[group] + 1) * size + window - 1)
        if seq.kept is not None:
            event = min(event, (sum(seq.kept) + seq.num_hidden + 1) * size)
        seq.next_event = event

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

    def longest(self, kept: Kept | None) -> int:
        """Most tokens that a sequence which keeps so much, alone, can have."""
        if kept is None:
            return self.max_sequence
        return min(
            NEVER
            if window is None and self.pools[group].num_blocks > sum(kept)
            else self._alone(group)
            for group, window in enumerate(self.windows)
        )

    def to_come(
        self,
        held: Sequence[int],
        reach: int,
        num_tokens: int,
        chunk: int,
        kept: Kept | None = None,
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
        return self.to_come(self.held(seq), len(seq.tables[0]), num_tokens, chunk, seq.kept)

    def spare(self, num_sequences: int) -> list[int]:
        """Per group: blocks that so many running sequences should find beyond those `to_come`."""
        return [num_sequences if group in self._paged else 0 for group in range(len(self.pools))]

    def can_admit(self, prefix: Prefix, num_tokens: int, chunk: int, reserve: list[int]) -> bool:
        """Whether a sequence that starts with `prefix` can compute all its `num_tokens` and leave
        `reserve` blocks of each group to those already running."""
        held = [len(blocks) - blocks.count(-1) for blocks in prefix.blocks]
        need = self.to_come(held, len(prefix.path), num_tokens, chunk, prefix.kept)
        for group in self._states.groups:
            need[group] = 1
        return all(
            more + taken + kept <= pool.num_free
            for pool, more, taken, kept in zip(
                self.pools, need, prefix.num_taken, reserve, strict=True
            )
        )

    def held(self, seq: SequenceKV) -> list[int]:
        """Per group: most blocks that freeing the sequence could give back."""
        reach = len(seq.tables[0])
        held = [reach - first for first in seq.first_held]
        for group in self._full:
            held[group] -= seq.num_hidden
        return held

    def lost(self, seq: SequenceKV, num_computed: int) -> int:
        """Tokens that the sequence would compute again if it gave its blocks back and others took
        them: all but those whose blocks others hold, too."""
        shared = 0
        for group, table in enumerate(seq.tables):
            if self.windows[group] is None:
                count = self.pools[group].ref_count
                mine = (i for i, b in enumerate(table) if b < 0 or count(b) < 2)
                first = next(mine, len(table))
                shared = first * self.block_size
                break
        return max(0, num_computed - shared)

    @property
    def usage(self) -> float:
        """Share of blocks held by running sequences, of the group that is fullest."""
        return max(1.0 - pool.num_free / pool.num_blocks for pool in self.pools)

    @property
    def blocks(self) -> dict[str, int]:
        """How many of all groups' are in each state: held by running sequences, leased to sessions,
        cached, or free of any content."""
        total = sum(pool.num_blocks for pool in self.pools)
        leased = sum(len(pool.leased) for pool in self.pools)
        cached = sum(len(pool.cached) for pool in self.pools)
        held = total - sum(pool.num_free for pool in self.pools)
        free = max(0, total - held - leased - cached)  # others may write meanwhile
        return {"total": total, "free": free, "held": held, "cached": cached, "leased": leased}

    def check(self, sequences: Iterable[SequenceKV]) -> None:
        """Assert all invariants, given every sequence that holds blocks."""
        sequences = list(sequences)
        counts = [[0] * pool.num_blocks for pool in self.pools]
        for seq in sequences:
            assert {len(table) * self.block_size for table in seq.tables} == {seq.capacity}
            assert seq.num_published * self.block_size <= seq.capacity
            for group, table in enumerate(seq.tables):
                first = seq.first_held[group]
                assert all(block == -1 for block in table[:first]), "holds blocks out of sight"
                if group in self._full:
                    assert first == 0 and (seq.kept or not seq.num_hidden), "lost blocks"
                    gap = self._match.hidden(group, seq.kept, seq.capacity)[: seq.num_hidden]
                    assert {table[i] for i in gap} <= {-1} and len(gap) == seq.num_hidden
                    table = [block for i, block in enumerate(table) if i not in gap]
                for block in table[first:]:
                    assert block >= 0 or group in self._states.groups, "a block is missing"
                    if block >= 0:
                        counts[group][block] += 1
        for pool, expected in zip(self.pools, counts, strict=True):
            pool.check()
            actual = [pool.ref_count(block) for block in range(pool.num_blocks)]
            assert actual == expected, "reference counts and tables disagree"
        self.tree.check()
        held = Counter(id(node) for seq in sequences for node in seq.nodes)
        coming = Counter(id(n) for seq in sequences for n in seq.nodes[seq.num_published :])
        tails = Counter(id(seq.tail) for seq in sequences if seq.tail is not None)
        for node in self.tree.nodes():
            assert node.holders == held[id(node)] + tails[id(node)], "somebody holds it, or nobody"
            assert node.coming == coming[id(node)] + tails[id(node)], "nobody computes what comes"
        if self._below is not None:
            self._below.check()
