"""PagedLRU: contents by key in a fixed amount of memory, the longest unused given up first."""

from __future__ import annotations

import mmap
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

PAGE_BYTES = 8192


class Content:
    """Some pages. Whoever holds it in a `with` of PagedLRU may use its views, nobody else."""

    __slots__ = ("pages", "size", "tag", "users", "views")

    def __init__(self, pages: array[int], size: int, tag: int, views: list[memoryview]) -> None:
        self.pages, self.size, self.tag, self.views = pages, size, tag, views
        self.users = 1
        """Who reads or writes it, and 1 while it is found by its key."""


class PagedLRU:
    """One mapping of `max_bytes`, cut into pages: what is written, kept and read lies within it, so
    that memory neither grows nor falls to pieces, and a page that was touched once costs no fault
    again. Its methods may be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.num_pages = max_bytes // PAGE_BYTES
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, self.num_pages * PAGE_BYTES, flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(memory)
        self._free = array("I", range(self.num_pages - 1, -1, -1))
        self._found: OrderedDict[bytes, Content] = OrderedDict()
        self._lock = threading.Lock()
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._found)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def has(self, key: bytes) -> bool:
        return key in self._found

    @contextmanager
    def reading(self, key: bytes) -> Iterator[Content | None]:
        """The content, which stays as it is meanwhile, whatever others do; None: it is not there."""
        with self._lock:
            content = self._found.get(key)
            if content is not None:
                content.users += 1
                self._found.move_to_end(key)
        try:
            yield content
        finally:
            if content is not None:
                self._release(content)

    @contextmanager
    def writing(self, key: bytes, size: int, tag: int) -> Iterator[list[memoryview] | None]:
        """Views to be filled with `size` bytes, found by `key` once the block has ended, unless it
        raises. None: what others read and write at this moment leaves no room."""
        content = self._allocate(size, tag)
        if content is None:
            yield None
            return
        try:
            yield content.views
        except BaseException:
            self._release(content)
            raise
        with self._lock:
            before = self._found.pop(key, None)
            self._found[key] = content
        if before is not None:
            self._release(before)

    def drop(self, key: bytes) -> bool:
        with self._lock:
            content = self._found.pop(key, None)
        if content is not None:
            self._release(content)
        return content is not None

    def _allocate(self, size: int, tag: int) -> Content | None:
        count = -(-size // PAGE_BYTES)
        with self._lock:
            if not self._evict_for(count):
                return None
            pages = self._free[len(self._free) - count :][::-1]
            del self._free[len(self._free) - count :]
        return Content(pages, size, tag, self._views(pages, size))

    def _evict_for(self, count: int) -> bool:
        """Give up the longest unused of those that nobody reads, until so many pages are free."""
        missing = count - len(self._free)
        victims = []
        for key, content in self._found.items():
            if missing <= 0:
                break
            if content.users == 1:
                victims.append(key)
                missing -= len(content.pages)
        if missing > 0:
            return False
        for key in victims:
            self._free.extend(self._found.pop(key).pages[::-1])
        self.num_evicted += len(victims)
        return True

    def _release(self, content: Content) -> None:
        with self._lock:
            content.users -= 1
            if content.users == 0:
                self._free.extend(content.pages[::-1])

    def _views(self, pages: array[int], size: int) -> list[memoryview]:
        """Of the bytes in order; neighbouring pages in one."""
        starts = [i for i in range(len(pages)) if i == 0 or pages[i] != pages[i - 1] + 1]
        views = []
        for first, stop in pairwise([*starts, len(pages)]):
            at = pages[first] * PAGE_BYTES
            length = min((stop - first) * PAGE_BYTES, size - first * PAGE_BYTES)
            views.append(self._memory[at : at + length])
        return views
