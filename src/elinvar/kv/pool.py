"""BlockPool: the blocks of one KV group. Owns reference counts, content keys and the free list.

A block is in exactly one of three states: held (reference count above 0), plain (free, its
content is worthless) or cached (free, but still findable by the key of its content until it is
given out again). It knows nothing of sequences, tokens or windows; that is the manager's.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """`num_blocks` blocks with ids 0 .. num_blocks - 1."""

    __slots__ = ("_by_key", "_cached", "_keys", "_plain", "_refs", "num_blocks", "num_free")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        # A stack: the block freed last is given out first, so a light load touches little memory.
        self._plain = list(range(num_blocks - 1, -1, -1))
        # Least recently freed first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller saw that num_free suffices.

        Plain blocks go first; then the cached block freed longest ago loses its content.
        """
        refs, plain = self._refs, self._plain
        blocks = []
        for _ in range(count):
            block = plain.pop() if plain else self._evict()
            refs[block] = 1
            blocks.append(block)
        self.num_free -= count
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None
        return block

    def share(self, block: int) -> None:
        """One more reference to a block that `find` returned."""
        if self._refs[block] == 0:
            del self._cached[block]
            self.num_free -= 1
        self._refs[block] += 1

    def free(self, block: int) -> None:
        """One reference less. With the last one the block is free, and cached if it has a key."""
        self._refs[block] -= 1
        if self._refs[block]:
            return
        self.num_free += 1
        if self._keys[block] is None:
            self._plain.append(block)
        else:
            self._cached[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Make a held block findable by the key of its content.

        Where another block has the same content already, this one stays private to its holder.
        """
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """A held block can no longer be found: its holder will write to it."""
        if key := self._keys[block]:
            del self._by_key[key]
            self._keys[block] = None

    def drop(self, key: bytes) -> None:
        """The content of this key is worth less than any other. Nothing, where it is in use."""
        block = self._by_key.get(key)
        if block is not None and self._refs[block] == 0:
            del self._cached[block]
            self.forget(block)
            self._plain.append(block)

    def find(self, key: bytes) -> int | None:
        return self._by_key.get(key)

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def is_published(self, block: int) -> bool:
        return self._keys[block] is not None

    def check(self) -> None:
        """Assert all invariants. Linear in num_blocks: for tests and for an idle engine."""
        plain, cached = set(self._plain), set(self._cached)
        held = {block for block, count in enumerate(self._refs) if count > 0}
        assert min(self._refs, default=0) >= 0, "negative reference count"
        assert len(plain) == len(self._plain), "a block is twice in the free list"
        assert not (plain & cached or plain & held or cached & held), "a block in two states"
        assert len(plain) + len(cached) + len(held) == self.num_blocks, "a block in no state"
        assert self.num_free == len(plain) + len(cached), "num_free is wrong"
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, "keys and index disagree"
        assert all(self._keys[block] is None for block in plain), "a plain block has a key"
        assert all(self._keys[block] is not None for block in cached), "a cached block has no key"
