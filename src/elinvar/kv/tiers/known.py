"""Known: what a tier was found to have and not to have, of the keys seen last."""

from __future__ import annotations

from collections import OrderedDict

_MOST = 1 << 18
_ABSENT_S = 10.0
"""So long it is believed that a key is not there: others may write it."""


class Known:
    """Not locked."""

    def __init__(self) -> None:
        self._there: OrderedDict[bytes, int] = OrderedDict()
        self._absent: OrderedDict[bytes, float] = OrderedDict()

    def answer(self, key: bytes, now: float) -> bool | None:
        """Whether it is there; None: not known."""
        if key in self._there:
            return True
        return False if self._absent.get(key, now) > now else None

    def learn(self, key: bytes, num_bytes: int | None, now: float) -> None:
        """It is there, a content of so many bytes, or (None) is not."""
        self._there.pop(key, None)
        self._absent.pop(key, None)
        if num_bytes is None:
            self._absent[key] = now + _ABSENT_S
        else:
            self._there[key] = num_bytes
        for known in (self._there, self._absent):
            if len(known) > _MOST:
                known.popitem(last=False)

    def example(self) -> tuple[bytes, int] | None:
        """A key that is there, the one learnt last, and the size of its content."""
        return next(reversed(self._there.items()), None)
