"""Match: the longest prefix that every group can serve, to the token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from elinvar.kv.tree import TOKEN_BYTES, Node, Tree, pack

_WORTH = 8
"""Tokens of a block for which it is better to wait than to compute them again: about a step that
only waits for the weights."""


Has = Callable[[Node, int], bool]
"""Whether a node's content in a group can be had."""


def in_memory(node: Node, group: int) -> bool:
    return node.blocks[group] >= 0


@dataclass(slots=True)
class Found:
    num_tokens: int
    path: list[Node]
    """Its whole blocks."""
    tail: Node | None
    """What begins as the rest of it does."""
    num_shared: int
    """Tokens in the blocks that the groups which keep every block can serve."""
    coming: Node | None
    """What would come next, which a living sequence is about to compute."""


class Match:
    """windows: of each group, None where every block is kept. states: groups of recurrent states."""

    def __init__(
        self, block_size: int, windows: Sequence[int | None], states: Sequence[int], tree: Tree
    ) -> None:
        self._size = block_size
        self._windows = windows
        self._full = [group for group, window in enumerate(windows) if window is None]
        self._windowed = [(g, w, g in states) for g, w in enumerate(windows) if w is not None]
        self._has_states = bool(states)
        self._tree = tree

    def longest(self, root: bytes, token_ids: Sequence[int], has: Has = in_memory) -> Found:
        """Of all `token_ids` but the last; `has`: what can be had."""
        tokens = pack(token_ids[: len(token_ids) - 1])
        top = self._tree.root(root)
        return self.within(top, self._walk(top, tokens), tokens, has)

    def within(self, top: Node, path: list[Node], tokens: bytes, has: Has) -> Found:
        """The same, given the nodes of the whole blocks."""
        held = self._num_held(path, has)
        coming = self._coming(path, held, len(tokens))
        del path[held:]
        shared = held * self._size if self._full else 0
        block = self._size * TOKEN_BYTES
        above, rest = path[-1] if path else top, tokens[held * block : (held + 1) * block]
        for child, count in self._tree.near(above, rest):
            if self._serves(path, child, count, has):
                return Found(held * self._size + count, path, child, shared, coming)
            if child.coming and count >= _WORTH and not self._has_states:
                coming = coming or child
        self._settle(path, has)
        return Found(len(path) * self._size, path, None, shared, coming)

    def chain(self, root: bytes, token_ids: Sequence[int]) -> tuple[Node, list[Node], bytes]:
        """What `within` takes: nodes of all whole blocks, of which some may not be in the tree."""
        tokens = pack(token_ids[: len(token_ids) - 1])
        top = self._tree.root(root)
        path = self._walk(top, tokens)
        block = self._size * TOKEN_BYTES
        for at in range(len(path) * block, len(tokens) - block + 1, block):
            path.append(self._tree.imagine(path[-1] if path else top, tokens[at : at + block]))
        return top, path, tokens

    def needed(self, found: Found) -> Iterator[tuple[Node, int]]:
        """Nodes and groups whose contents serve `found` and are not in memory, in their order."""
        firsts = [self.first_needed(group, found) for group in range(len(self._windows))]
        for index, node in enumerate([*found.path, *([found.tail] if found.tail else [])]):
            for group, first in enumerate(firsts):
                if index >= first and node.blocks[group] < 0:
                    yield node, group

    def first_needed(self, group: int, found: Found) -> int:
        """Index of the first whole block of `found` that is needed; past the last where none is."""
        window = self._windows[group]
        if window is None:
            return 0
        return min(self.first_seen(found.num_tokens, window), len(found.path))

    def _walk(self, node: Node, tokens: bytes) -> list[Node]:
        path: list[Node] = []
        block = self._size * TOKEN_BYTES
        for at in range(0, len(tokens) - block + 1, block):
            child = self._tree.child(node, tokens[at : at + block])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _num_held(self, path: Sequence[Node], has: Has) -> int:
        """Leading blocks that the groups which keep every block can serve."""
        for index, node in enumerate(path):
            if not all(has(node, group) for group in self._full):
                return index
        return len(path)

    def _coming(self, path: Sequence[Node], held: int, num_bytes: int) -> Node | None:
        """States are left at the last border alone, where only who begins with all of it begins."""
        if held == len(path):
            return None
        ends = len(path) == num_bytes // (self._size * TOKEN_BYTES)
        node = path[-1] if self._has_states else path[held]
        return node if node.coming and (ends or not self._has_states) else None

    def _serves(self, path: Sequence[Node], tail: Node, count: int, has: Has) -> bool:
        """Whether a sequence can begin after `path` and `count` tokens of `tail`. A state is that
        after its last token, and no other."""
        if not all(has(tail, group) for group in range(len(tail.blocks))):
            return False
        end = len(path) * self._size + count
        return all(
            count == tail.num_tokens
            if is_state
            else all(has(node, group) for node in path[self.first_seen(end, window) :])
            for group, window, is_state in self._windowed
        )

    def _settle(self, path: list[Node], has: Has) -> None:
        """Shorten `path` until all groups can serve it. Where it is shortened for one, another may
        have a gap."""
        before = -1
        while path and len(path) != before:
            before = len(path)
            for group, window, _ in self._windowed:
                del path[self._num_served(path, group, window, has) :]

    def _num_served(self, path: Sequence[Node], group: int, window: int, has: Has) -> int:
        # Walks down from the end; a gap at block i means that the prefix can only end at i, so
        # each block is looked at once.
        count = len(path)
        while count:
            first = self.first_seen(count * self._size, window)
            gaps = (i for i in range(count - 1, first - 1, -1) if not has(path[i], group))
            gap = next(gaps, -1)
            if gap < 0:
                return count
            count = gap
        return 0

    def first_seen(self, position: int, window: int) -> int:
        """Index of the first block that a query at `position` sees."""
        return max(0, position - window + 1) // self._size
