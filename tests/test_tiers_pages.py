"""Contents in pages: whatever is written, read, dropped and given up meanwhile, no page is lost,
none is had twice, and what is read is what was written."""

from __future__ import annotations

from contextlib import ExitStack, suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elinvar.kv.tiers.pages import PAGE_BYTES, Content, PagedLRU

PAGES = 8
KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
SIZES = st.integers(0, 5 * PAGE_BYTES)


def fill(views: list[memoryview], byte: int) -> None:
    for view in views:
        view[:] = bytes([byte]) * len(view)


class PagedLRUMachine(RuleBasedStateMachine):
    """The model: a list of (key, size, byte), the longest unused first. Readers and writers stay
    open over other steps, as threads do."""

    def __init__(self) -> None:
        super().__init__()
        self.lru = PagedLRU(PAGES * PAGE_BYTES + 100)
        self.model: list[tuple[bytes, int, int]] = []
        self.readers: list[tuple[ExitStack, Content, int]] = []
        self.writers: list[tuple[ExitStack, bytes, int, list[memoryview], int]] = []
        self.byte = 0

    def forget_evicted(self) -> None:
        self.model = [one for one in self.model if self.lru.has(one[0])]

    @precondition(lambda self: len(self.writers) < 3)
    @rule(key=KEYS, size=SIZES)
    def begin_write(self, key: bytes, size: int) -> None:
        before = [one[0] for one in self.model]
        stack = ExitStack()
        views = stack.enter_context(self.lru.writing(key, size, self.byte))
        if views is None:
            stack.close()
            assert [one for one in before if self.lru.has(one)] == before
            assert self.readers or self.writers or size > PAGES * PAGE_BYTES
            return
        assert sum(map(len, views)) == size
        self.byte = (self.byte + 1) % 256
        self.writers.append((stack, key, size, views, self.byte))
        held = {id(content) for _, content, _ in self.readers}
        gone = [i for i, one in enumerate(before) if not self.lru.has(one)]
        kept = [i for i, one in enumerate(before) if self.lru.has(one)]
        for i in kept:  # whoever is kept is younger than all that are gone, or being read
            assert all(i > j for j in gone) or id(self.lru._found[before[i]]) in held
        self.forget_evicted()

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), fails=st.booleans())
    def end_write(self, data: st.DataObject, fails: bool) -> None:
        at = data.draw(st.integers(0, len(self.writers) - 1))
        stack, key, size, views, byte = self.writers.pop(at)
        fill(views, byte)
        if fails:
            error = RuntimeError()
            with suppress(RuntimeError):
                stack.__exit__(RuntimeError, error, None)
            return
        stack.close()
        self.model = [one for one in self.model if one[0] != key] + [(key, size, byte)]

    @precondition(lambda self: len(self.readers) < 3)
    @rule(key=KEYS)
    def begin_read(self, key: bytes) -> None:
        stack = ExitStack()
        content = stack.enter_context(self.lru.reading(key))
        known = [one for one in self.model if one[0] == key]
        assert (content is not None) == bool(known)
        if content is None:
            stack.close()
            return
        assert content.size == known[0][1]
        self.readers.append((stack, content, known[0][2]))
        self.model = [one for one in self.model if one[0] != key] + known

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))[0].close()

    @rule(key=KEYS)
    def drop(self, key: bytes) -> None:
        assert self.lru.drop(key) == any(one[0] == key for one in self.model)
        self.model = [one for one in self.model if one[0] != key]

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        for _, content, byte in self.readers:
            assert all(bytes(view) == bytes([byte]) * len(view) for view in content.views)
            assert sum(map(len, content.views)) == content.size

    @invariant()
    def every_page_has_one_place(self) -> None:
        contents = {id(c): c for c in self.lru._found.values()}
        contents |= {id(c): c for _, c, _ in self.readers}
        pages = [page for c in contents.values() for page in c.pages]
        writing = sum(-(-size // PAGE_BYTES) for _, _, size, _, _ in self.writers)
        assert len(set(pages)) == len(pages) and not set(pages) & set(self.lru._free)
        assert len(pages) + writing + self.lru.num_free_pages == PAGES
        assert list(self.lru._found) == [one[0] for one in self.model]

    def teardown(self) -> None:
        for stack in [one[0] for one in self.readers] + [one[0] for one in self.writers]:
            stack.close()
        for key in (b"a", b"b", b"c", b"d"):
            self.lru.drop(key)
        assert self.lru.num_free_pages == PAGES and len(self.lru) == 0


PagedLRUMachine.TestCase.settings = settings(max_examples=60, deadline=None)
TestPagedLRU = PagedLRUMachine.TestCase
