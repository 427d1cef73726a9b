"""Tree: what is cached, by tokens. A node is a block of a sequence: the tokens from one block border to
the next, or, at a sequence's end, fewer. Its key says all that its content depends on.

It knows which block of each group holds a node's content, not who may use or evict it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from elinvar.base.digest import blake2b

_NEAR = 8
"""Children that are looked at where a sequence parts from all of them."""
TOKEN_BYTES = 4


def pack(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


class Node:
    __slots__ = (
        "blocks",
        "children",
        "coming",
        "holders",
        "key",
        "parent",
        "saved",
        "starts",
        "tokens",
    )

    def __init__(self, parent: Node | None, tokens: bytes, key: bytes, num_groups: int) -> None:
        self.parent = parent
        self.tokens = tokens
        """Four bytes each."""
        self.key = key
        """256-bit BLAKE2b over the parent's key and the tokens: equal keys mean equal sequences."""
        self.blocks = [-1] * num_groups
        """Per group: the block with the content, -1 where there is none."""
        self.children: list[Node] = []
        """In the order of their tokens, so that those with a common beginning are neighbours."""
        self.starts: list[bytes] = []
        """Their tokens."""
        self.holders = 0
        """Living sequences that this is a part of."""
        self.coming = 0
        """Those of them that are about to compute it."""
        self.saved = False
        """Whether its content may be found below the provider's memory."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def is_bare(self) -> bool:
        """Nobody would miss it."""
        return not (self.holders or self.saved or self.children) and max(self.blocks) < 0


class Tree:
    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._roots: dict[bytes, Node] = {}

    def root(self, namespace: bytes) -> Node:
        """Where sequences begin whose contents depend on `namespace` besides their tokens."""
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = self._new_root(namespace)
        return node

    def peek(self, namespace: bytes) -> Node:
        """The same to look at, of which the tree need not know."""
        return self._roots.get(namespace) or self._new_root(namespace)

    def _new_root(self, namespace: bytes) -> Node:
        key = blake2b(namespace, digest_size=32).digest()
        return Node(None, namespace, key, self._num_groups)

    def child(self, node: Node, tokens: bytes) -> Node | None:
        starts = node.starts
        at = bisect_left(starts, tokens)
        return node.children[at] if at < len(starts) and starts[at] == tokens else None

    def grow(self, node: Node, tokens: bytes) -> Node:
        """The child with these tokens, made where there is none. The caller holds `node`."""
        starts = node.starts
        at = bisect_left(starts, tokens)
        if at < len(starts) and starts[at] == tokens:
            return node.children[at]
        made = self.imagine(node, tokens)
        starts.insert(at, tokens)
        node.children.insert(at, made)
        return made

    def imagine(self, node: Node, tokens: bytes) -> Node:
        """A child of which the tree does not know."""
        key = blake2b(node.key + tokens, digest_size=32).digest()
        return Node(node, tokens, key, self._num_groups)

    def near(self, node: Node, tokens: bytes) -> Iterator[tuple[Node, int]]:
        """Children that begin as `tokens` do, and with how many: the longest first, few of them."""
        at = bisect_left(node.starts, tokens)
        below, above = at - 1, at
        for _ in range(_NEAR):
            left = common(node.starts[below], tokens) if below >= 0 else 0
            right = common(node.starts[above], tokens) if above < len(node.starts) else 0
            if left == right == 0:
                return
            if left > right:
                yield node.children[below], left
                below -= 1
            else:
                yield node.children[above], right
                above += 1

    def superseded(self, node: Node) -> Node | None:
        """A tail beside `node` that begins as it does and ends sooner."""
        parent = node.parent
        assert parent is not None
        at = bisect_left(parent.starts, node.tokens) - 1
        return (
            parent.children[at] if at >= 0 and node.tokens.startswith(parent.starts[at]) else None
        )

    def prune(self, node: Node) -> None:
        """Take away what is bare, from `node` upwards."""
        while node.is_bare:
            parent = node.parent
            if parent is None:
                if self._roots.get(node.tokens) is node:
                    del self._roots[node.tokens]
                return
            at = bisect_left(parent.starts, node.tokens)
            del parent.starts[at], parent.children[at]
            node = parent

    def nodes(self) -> Iterator[Node]:
        """All, in no order."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children

    def check(self) -> None:
        """Assert all invariants. Linear in the nodes: for tests and for an idle engine."""
        for node in self.nodes():
            assert node.starts == sorted(set(node.starts)), "children out of order, or twice"
            assert [child.tokens for child in node.children] == node.starts
            assert all(child.parent is node for child in node.children)
            assert 0 <= node.coming <= node.holders
            assert not node.is_bare or node.parent is None, "a bare node stays"


def key_of(node: Node, group: int) -> bytes:
    """What the content of `node` in a group is known by below the provider's memory."""
    return node.key + bytes([group])


def common(one: bytes, other: bytes) -> int:
    """Tokens that both begin with."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count // TOKEN_BYTES
    differ = int.from_bytes(one[:count]) ^ int.from_bytes(other[:count])
    return (count * 8 - differ.bit_length()) // (8 * TOKEN_BYTES)
