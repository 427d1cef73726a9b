"""Stop texts over a stream of deltas.

The answer ends before the stop text that is complete first; of several that are complete at the
same character, the longest counts. So the result depends on the characters alone, not on how
they were cut into deltas. What may still become a stop text is held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Follows all stop texts at once, character by character (Knuth, Morris and Pratt, 1977).

    keep: the stop text that ends the answer is a part of it."""

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        self._keep = keep
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        """Per stop: the length of its longest prefix that the text so far ends with."""
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be emitted now, the stop text that is complete)."""
        held = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            for i, stop in enumerate(self._stops):
                if self._advance(i, char) == len(stop):
                    self._held = ""
                    return held[: end if self._keep else end - len(stop)], stop
        keep = len(held) - max(self._matched, default=0)
        self._held = held[keep:]
        return held[:keep], None

    def finish(self) -> str:
        """What was held back, when the text ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _advance(self, i: int, char: str) -> int:
        stop, failures, matched = self._stops[i], self._failures[i], self._matched[i]
        while matched and stop[matched] != char:
            matched = failures[matched - 1]
        if stop[matched] == char:
            matched += 1
        self._matched[i] = matched
        return matched


def _failure_table(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = table[matched - 1]
        if stop[i] == stop[matched]:
            matched += 1
        table[i] = matched
    return table
