"""Below: contents of blocks in the tiers below the provider's memory, as sequences look for them.

Owns what is saved and which nodes are remembered for it. A search takes several steps: tiers are asked
what they have, then to bring it into host memory; meanwhile its sequence waits, and everything else
goes on. What does not come is computed.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from elinvar.base.plan import MOST_BYTES, BlockMove
from elinvar.kv.match import Found, Match
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import Lookup
from elinvar.kv.tiers.hierarchy import HOST, UNKNOWN, Tiers
from elinvar.kv.tree import Node, Tree, key_of

_MOST_EVICTED = 4 * MOST_BYTES
"""Of what a plan gives up, for one who takes a long prefix at once: what is more is lost rather than that
everybody waits."""
_HOST_FULL, _HOST_LEFT = 0.97, 0.9
"""Shares of host memory at which some is given up, and that are kept then: some percent at a time, since
it takes a look at all of it."""


class Below:
    """block_bytes: of each group."""

    def __init__(
        self,
        tiers: Tiers,
        tree: Tree,
        match: Match,
        pools: Sequence[BlockPool],
        block_bytes: Sequence[int],
    ) -> None:
        self._tiers, self._tree, self._match, self._pools = tiers, tree, match, pools
        self._bytes = block_bytes
        self.saves: list[BlockMove] = []
        """Of the plan that is being made."""
        self.compute_s: Callable[[int, int], float] = lambda start, end: math.inf
        """Seconds that computing the tokens from one position to another takes."""
        # Free blocks that were not saved, for when nobody has work, the one freed longest ago first.
        self._unsaved: OrderedDict[tuple[int, int], Node] = OrderedDict()
        self._left = _MOST_EVICTED
        # Nodes that may be found below, the one saved longest ago first: the tree keeps them, though
        # no block may have their content.
        self._saved: OrderedDict[int, Node] = OrderedDict()
        self._most_saved = 1024 + 8 * sum(pool.num_blocks for pool in pools)
        for pool in pools:
            pool.evicted = self._evicted(pool.group)

    # ---- what goes down ---------------------------------------------------------------------

    def _evicted(self, group: int) -> Callable[[int, Node], None]:
        def save(block: int, node: Node) -> None:
            if self._left > 0:
                self._left -= self._save(group, block, node)

        return save

    def _save(self, group: int, block: int, node: Node) -> int:
        node.saved = True
        self._saved[id(node)] = node
        self._saved.move_to_end(id(node))
        if len(self._saved) > self._most_saved:
            _, oldest = self._saved.popitem(last=False)
            oldest.saved = False
            self._tree.prune(oldest)
        key = key_of(node, group)
        if self._tiers.where([key])[0] == HOST:
            return 0
        self.saves.append(BlockMove(group, block, key))
        return self._bytes[group]

    def freed(self, group: int, block: int, node: Node) -> None:
        """Nobody holds this block any more."""
        self._unsaved[group, block] = node
        self._unsaved.move_to_end((group, block))

    @property
    def has_unsaved(self) -> bool:
        return bool(self._unsaved)

    def save_some(self) -> None:
        """In a step that has nothing else to do: what is lost when the engine ends."""
        left = MOST_BYTES
        while self._unsaved and left > 0:
            (group, block), node = self._unsaved.popitem(last=False)
            if node.blocks[group] == block:
                left -= self._save(group, block, node)

    def take_saves(self) -> list[BlockMove]:
        """Those of the plan that was made."""
        saves, self.saves, self._left = self.saves, [], _MOST_EVICTED
        return saves

    def forget_all(self) -> None:
        """What is cached is of no use to anybody any more."""
        self._unsaved.clear()
        while self._saved:
            _, node = self._saved.popitem()
            node.saved = False
            self._tree.prune(node)

    def trim(self, paths: Callable[[], list[Sequence[Node]]]) -> None:
        """Make room in host memory before it is full and gives up what was not used for longest: what
        is of none of the paths, then the end of the first path, and so on."""
        tiers = self._tiers
        if tiers.host_share < _HOST_FULL:
            return
        kept = paths()
        owners = Counter(node.key for path in kept for node in path)
        for key in tiers.host_keys():
            if tiers.host_share <= _HOST_LEFT:
                return
            if key[:-1] not in owners:
                tiers.forget(key)
        for node in (node for path in kept for node in reversed(path)):
            if tiers.host_share <= _HOST_LEFT:
                return
            owners[node.key] -= 1
            if not owners[node.key]:
                for group in range(len(self._bytes)):
                    tiers.forget(key_of(node, group))

    def num_known(self, nodes: Sequence[Node], group: int) -> int:
        """Tokens of them that some tier is known to have."""
        levels = self._tiers.where([key_of(node, group) for node in nodes])
        return sum(n.num_tokens for n, at in zip(nodes, levels, strict=True) if at >= HOST)

    def check(self) -> None:
        """Assert all invariants. Linear in the nodes: for tests and for an idle engine."""
        assert len(self._saved) <= self._most_saved
        for node in self._tree.nodes():
            assert node.saved == (id(node) in self._saved), "remembered for ever, or not at all"

    # ---- what comes up ----------------------------------------------------------------------

    def search(
        self, lookup: Lookup, root: bytes, token_ids: Sequence[int], found: Found
    ) -> Found | None:
        """What `found` becomes when contents in host memory count, too, where they stay until the
        lookup has ended; None: not known yet."""
        if lookup.over:
            return found
        if lookup.ticket is not None and not lookup.ticket.done:
            return None
        top, path, tokens = self._match.chain(root, token_ids)
        levels = _Levels(self._tiers, path, len(self._bytes))

        def best(least: int, most: int) -> Found:
            def has(node: Node, group: int) -> bool:
                return node.blocks[group] >= 0 or least <= levels.of(node, group) <= most

            return self._match.within(top, list(path), tokens, has, found.kept)

        if lookup.fetching:
            ready = best(HOST, HOST)
            if ready.num_tokens > found.num_tokens:
                return ready
            lookup.end()
            return found
        last = len(self._tiers.names) - 1
        known = found.num_tokens
        if lookup.asked or not self._ask(lookup, best(UNKNOWN, last), levels, known):
            self._fetch(lookup, best(HOST, last), levels, known)
        return self.search(lookup, root, token_ids, found)

    def _ask(self, lookup: Lookup, hoped: Found, levels: _Levels, known: int) -> bool:
        """Ask the tiers for what nobody knows of; whether there is something to ask that is not
        computed in less time than they take to answer."""
        lookup.asked = True
        unknown = [n for n in self._match.needed(hoped) if levels.of(*n) == UNKNOWN]
        most = self.compute_s(known, hoped.num_tokens) or math.inf
        if not unknown or most < self._tiers.ask_s:
            return False
        lookup.ticket = self._tiers.ask(*self._keys(unknown))
        return True

    def _fetch(self, lookup: Lookup, there: Found, levels: _Levels, known: int) -> None:
        """Have it brought up where that is quicker than to compute it."""
        if there.num_tokens <= known:
            lookup.end()
            return
        needed = list(self._match.needed(there))
        keys, sizes = self._keys(needed)
        seconds = self._tiers.predict([levels.of(*n) for n in needed], sizes)
        # A tier that was never read is tried once; nor is it known what computing takes at first.
        if math.isfinite(seconds) and seconds > (
            self.compute_s(known, there.num_tokens) or math.inf
        ):
            lookup.end()
            return
        names = self._tiers.names
        lookup.origins = {key_of(*n): names[levels.of(*n)] for n in needed}
        lookup.fetching = True
        lookup.ticket = self._tiers.fetch(keys, sizes)

    def _keys(self, needed: Sequence[tuple[Node, int]]) -> tuple[list[bytes], list[int]]:
        return [key_of(*n) for n in needed], [self._bytes[group] for _, group in needed]


class _Levels:
    """Where the contents of nodes are, each looked up once."""

    def __init__(self, tiers: Tiers, path: Sequence[Node], num_groups: int) -> None:
        self._tiers = tiers
        missing = [(n, g) for n in path for g in range(num_groups) if n.blocks[g] < 0]
        keys = [key_of(*one) for one in missing]
        self._levels = dict(zip(keys, tiers.where(keys), strict=True))

    def of(self, node: Node, group: int) -> int:
        key = key_of(node, group)
        if key not in self._levels:
            self._levels[key] = self._tiers.where([key])[0]
        return self._levels[key]
