"""Match: the longest prefix that every group can serve, to the token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from elinvar.kv.tree import TOKEN_BYTES, Node, Tree, pack

_WORTH = 8
"""Tokens of a block for which it is better to wait than to compute them again: about a step that
only waits for the weights."""

Kept = tuple[int, int]
"""What a sequence that forgets keeps in groups without a window: so many first blocks, and so many last
ones before that of the next token."""
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
    kept: Kept | None = None
    """What the sequence keeps, None: everything."""


class Match:
    """windows: of each group, None where every block is kept. states: groups of recurrent states."""

    def __init__(
        self, block_size: int, windows: Sequence[int | None], states: Sequence[int], tree: Tree
    ) -> None:
        self.block_size = block_size
        self._windows = windows
        self.full = [group for group, window in enumerate(windows) if window is None]
        self._windowed = [g for g, window in enumerate(windows) if window is not None]
        self._has_states = bool(states)
        self._tree = tree

    def longest(
        self,
        root: bytes,
        token_ids: Sequence[int],
        kept: Kept | None = None,
        has: Has = in_memory,
    ) -> Found:
        """Of all `token_ids` but the last; `has`: what can be had."""
        tokens = pack(token_ids[: len(token_ids) - 1])
        top = self._tree.peek(root)
        return self.within(top, self._walk(top, tokens), tokens, has, kept)

    def within(
        self, top: Node, path: list[Node], tokens: bytes, has: Has, kept: Kept | None
    ) -> Found:
        """The same, given the nodes of the whole blocks."""
        held = self._num_held(path, has, kept)
        coming = self._coming(path, held, len(tokens))
        del path[held:]
        shared = held * self.block_size if self.full else 0
        block = self.block_size * TOKEN_BYTES
        above, rest = path[-1] if path else top, tokens[held * block : (held + 1) * block]
        for child, count in self._tree.near(above, rest):
            if self._serves(path, child, count, has, kept):
                return Found(held * self.block_size + count, path, child, shared, coming, kept)
            if child.coming and count >= _WORTH and not self._has_states:
                coming = coming or child
        self._settle(path, has, kept)
        return Found(len(path) * self.block_size, path, None, shared, coming, kept)

    def chain(self, root: bytes, token_ids: Sequence[int]) -> tuple[Node, list[Node], bytes]:
        """What `within` takes: nodes of all whole blocks, of which some may not be in the tree."""
        tokens = pack(token_ids[: len(token_ids) - 1])
        top = self._tree.peek(root)
        path = self._walk(top, tokens)
        block = self.block_size * TOKEN_BYTES
        for at in range(len(path) * block, len(tokens) - block + 1, block):
            path.append(self._tree.imagine(path[-1] if path else top, tokens[at : at + block]))
        return top, path, tokens

    def needed(self, found: Found) -> Iterator[tuple[Node, int]]:
        """Nodes and groups whose contents serve `found` and are not in memory, in their order."""
        unseen = [self.unseen(group, found) for group in range(len(self._windows))]
        for index, node in enumerate([*found.path, *([found.tail] if found.tail else [])]):
            for group, hidden in enumerate(unseen):
                if index not in hidden and node.blocks[group] < 0:
                    yield node, group

    def unseen(self, group: int, found: Found) -> range:
        """Indices of the whole blocks of `found` that are not needed."""
        hidden = self.hidden(group, found.kept, found.num_tokens)
        return hidden[: max(0, len(found.path) - hidden.start)]

    def _walk(self, node: Node, tokens: bytes) -> list[Node]:
        path: list[Node] = []
        block = self.block_size * TOKEN_BYTES
        for at in range(0, len(tokens) - block + 1, block):
            child = self._tree.child(node, tokens[at : at + block])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _num_held(self, path: Sequence[Node], has: Has, kept: Kept | None) -> int:
        """Leading blocks that the groups which keep every block can serve; of a sequence that
        forgets, those that nobody is about to compute."""
        for index, node in enumerate(path):
            is_missing = not all(has(node, group) for group in self.full)
            if is_missing and (kept is None or node.coming):
                return index
        return len(path)

    def _coming(self, path: Sequence[Node], held: int, num_bytes: int) -> Node | None:
        """States are left at the last border alone, where only who begins with all of it begins."""
        if held == len(path):
            return None
        ends = len(path) == num_bytes // (self.block_size * TOKEN_BYTES)
        node = path[-1] if self._has_states else path[held]
        return node if node.coming and (ends or not self._has_states) else None

    def _serves(
        self, path: Sequence[Node], tail: Node, count: int, has: Has, kept: Kept | None
    ) -> bool:
        """Whether a sequence can begin after `path` and `count` tokens of `tail`. A state is that
        after its last token, and no other."""
        if self._has_states and count != tail.num_tokens:
            return False
        if not all(has(tail, group) for group in range(len(tail.blocks))):
            return False
        end = len(path) * self.block_size + count
        return all(
            self._num_served(path, group, self.hidden(group, kept, end), has) == len(path)
            for group in self._partial(kept)
        )

    def _settle(self, path: list[Node], has: Has, kept: Kept | None) -> None:
        """Shorten `path` until all groups can serve it. Where it is shortened for one, another may
        have a gap."""
        before = -1
        while path and len(path) != before:
            before = len(path)
            for group in self._partial(kept):
                hidden = self.hidden(group, kept, len(path) * self.block_size)
                del path[self._num_served(path, group, hidden, has) :]

    def _partial(self, kept: Kept | None) -> Sequence[int]:
        """Groups that do not need every block."""
        return self._windowed if kept is None else range(len(self._windows))

    def _num_served(self, path: Sequence[Node], group: int, hidden: range, has: Has) -> int:
        # Walks down from the end; a gap at block i means that the prefix can only end at i, so
        # each block that is not always seen is looked at once.
        always = range(min(hidden.start, len(path)))
        seen = chain(range(len(path) - 1, max(hidden.stop, len(always)) - 1, -1), always)
        return next((i for i in seen if not has(path[i], group)), len(path))

    def hidden(self, group: int, kept: Kept | None, position: int) -> range:
        """Indices of the blocks that a query at `position` does not see any more."""
        if (window := self._windows[group]) is not None:
            return range(max(0, position - window + 1) // self.block_size)
        if kept is None:
            return range(0)
        num_first, num_last = kept
        return range(num_first, max(num_first, position // self.block_size - num_last))
