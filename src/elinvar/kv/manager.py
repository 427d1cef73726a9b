"""KVManager: which blocks every sequence holds, in each layer-kind group.

Owns the pools, the tree of what is cached, and the rule by which sliding groups give blocks back. It
must not know requests, rows or budgets (the scheduler's) nor arrays (the runner's). All groups have
the same block size, so the tables of a sequence have one length; where a group holds nothing its
table has -1.
How a prefix is found is kv/match.py's, what others may find kv/publish.py's, how much is still needed
kv/need.py's; what is particular to groups of recurrent states is kv/states.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from elinvar.base.config import KVSpec
from elinvar.base.plan import BlockCopy, BlockMove
from elinvar.kv.check import check_blocks, check_nodes
from elinvar.kv.match import Kept, Match
from elinvar.kv.need import NEVER, Need
from elinvar.kv.pool import BlockPool
from elinvar.kv.publish import Publish
from elinvar.kv.sequence import LOAD, Allocation, Lookup, Prefix, SequenceKV, Taken, first_of
from elinvar.kv.states import WINDOW, States
from elinvar.kv.tree import Node, Tree, key_of

if TYPE_CHECKING:
    from elinvar.kv.below import Below
    from elinvar.kv.tiers.hierarchy import Tiers


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
        self._publish = Publish(self.block_size, self.pools, self._states, self.tree)
        self.need = Need(specs, self.pools, self.windows, self._states.groups)
        self._paged = [g for g, spec in enumerate(specs) if not spec.state]
        self._sliding = [(g, w) for g, w in enumerate(self.windows) if w is not None]
        self._full = [g for g, w in enumerate(self.windows) if w is None]
        self._below: Below | None = None
        self._block_bytes = [spec.block_bytes for spec in specs]
        self.use_namespace(namespace)

    def use_namespace(self, namespace: str) -> None:
        """From now on nothing is found that was cached in another one; its blocks are given out
        again first. No sequence may be alive: they remember theirs."""
        self._namespace = namespace.encode()
        self.empty()
        if self._below is not None:
            self._below.forget_all()

    def empty(self) -> None:
        """No block holds anything of worth any more; what is below is found there. No sequence may be
        alive."""
        for node in list(self.tree.nodes()):
            for pool in self.pools:
                pool.drop(node)

    def new_sequence(
        self,
        namespace: bytes = b"",
        kept: Kept | None = None,
        shared: int = NEVER,
        sought: int = NEVER,
    ) -> SequenceKV:
        """namespace: what this sequence's contents depend on besides tokens and the manager's own.
        kept, shared, sought: as in SequenceKV."""
        # The length says where one ends: no pair of namespaces reads as another.
        root = len(self._namespace).to_bytes(4) + self._namespace + namespace
        tables: list[list[int]] = [[] for _ in self.pools]
        none_hidden = [0] * len(tables)
        seq = SequenceKV(tables, none_hidden, root, kept=kept, shared=shared, sought=sought)
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
        sought = first_of(token_ids, seq.sought)
        found = self._match.longest(seq.root, sought, seq.kept)
        pending = False
        # What somebody is about to compute, or to load, is in memory soon: once, for all who wait.
        if self._below is not None and not (seq.waits and found.coming):
            seq.lookup = seq.lookup or Lookup()
            more = self._below.search(seq.lookup, seq.root, sought, found)
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
        marks = self._states.marks(end, found.num_shared, len(sought))
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
            self._publish.announce(seq, prefix)
        self._set_next_event(seq)

    # ---- as it goes on, and ends -------------------------------------------------------------

    def advance(self, seq: SequenceKV, token_ids: Sequence[int], num_computed: int) -> None:
        """A step was committed: publish the blocks it filled, free those no query sees any more.

        Needed only when num_computed reached seq.next_event.
        """
        if self.prefix_cache:
            self._publish.advance(seq, token_ids, num_computed)
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

    def keep(self, seq: SequenceKV, chosen: Sequence[int]) -> None:
        """Of the blocks that its `shared` tokens fill or begin it sees these from now on: give back
        the others, where a group keeps every block. The end goes first, as in `free`."""
        dropped = set(range(-(-seq.shared // self.block_size))).difference(chosen)
        seq.dropped = sorted(dropped)
        for group in self._full:
            table = seq.tables[group]
            for index in reversed(seq.dropped):
                self._free(self.pools[group], table[index])
                table[index] = -1

    def free(
        self, seq: SequenceKV, token_ids: Sequence[int] = (), num_computed: int = 0
    ) -> list[Node]:
        """Give everything back. Ends first: they are then evicted first, so that what stays
        cached are the beginnings, which other sequences are likelier to share.

        num_computed: of `token_ids`, all that was computed, where that is known for certain: then
        what lies in the last block can be found, too. Returns what can be found of it now.
        """
        path = seq.nodes[: seq.num_published]
        if self.prefix_cache and (end := self._publish.end(seq, token_ids, num_computed)):
            path.append(end)
        for group, pool in enumerate(self.pools):
            for block in reversed(seq.tables[group][seq.first_held[group] :]):
                if block >= 0:
                    self._free(pool, block)
            seq.tables[group] = []
            seq.first_held[group] = 0
        seq.num_hidden, seq.dropped = 0, ()
        self._publish.leave(seq)
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
        event = (seq.num_published + 1) * size
        if not self.prefix_cache or event > seq.shared:
            event = NEVER
        if seq.tail is not None:
            event = min(event, seq.num_first)
        for group, window in self._sliding:
            # The first held block is out of sight once the query after it sees only later ones.
            event = min(event, (seq.first_held[group] + 1) * size + window - 1)
        if seq.kept is not None:
            event = min(event, (sum(seq.kept) + seq.num_hidden + 1) * size)
        seq.next_event = event

    @property
    def has_states(self) -> bool:
        """Some layers keep a state, which each step replaces."""
        return bool(self._states.groups)

    @property
    def num_free(self) -> int:
        """Blocks that can be had, of the group that has fewest."""
        return min(pool.num_free for pool in self.pools)

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

    @property
    def max_sequence(self) -> int:
        """Most tokens that one sequence, alone, can have in blocks."""
        return self.need.max_sequence

    def longest(self, kept: Kept | None) -> int:
        """The same of one that keeps so much."""
        return self.need.longest(kept)

    def check(self, sequences: Iterable[SequenceKV]) -> None:
        """Assert all invariants, given every sequence that holds blocks."""
        sequences = list(sequences)
        check_blocks(sequences, self.pools, self._match, self._states.groups)
        check_nodes(sequences, self.tree)
        if self._below is not None:
            self._below.check()
