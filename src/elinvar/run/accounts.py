"""What a drafter has cost and gained: whatever it does, it costs a set share of the time at most."""

from __future__ import annotations

ALLOWANCE = 0.005
"""Of the time that passes, what a drafter may lose."""
CREDIT = 4.0
"""Steps whose time it may lose besides, once; and again when it has gained it."""
CREDIT_TO_FOLLOW = 16.0
"""The same of one that reads states: prompts come before drafts."""
SAVED = 4.0
"""Times its credit that it may lose of what it gained: a wrong chain of each of some rows takes a credit."""
KEPT = 31 / 32
"""Of such savings, at each step: what was gained with one kind of text is not for the next."""


class Account:
    """What a drafter has cost and gained, in seconds. One that is empty is not asked until the time it
    may lose has come together again: so whatever it does, it costs a set share at most."""

    __slots__ = ("_balance", "_credit", "_most")

    def __init__(self, credit: float = CREDIT) -> None:
        """credit: in steps."""
        self._credit, self._balance = credit, 0.0
        self._most: float | None = None
        """Seconds of the credit: unknown until a step went by."""

    @property
    def is_open(self) -> bool:
        return self._most is None or self._balance > 0

    @property
    def can_begin(self) -> bool:
        """Something that costs now and may gain later: there is enough to see it through."""
        return self._balance >= (0.0 if self._most is None else self._most / 2)

    def pass_by(self, seconds: float, plain: float | None = None) -> None:
        """A step went by; plain: seconds of one without drafts, None: it was another kind of step."""
        if plain is not None:
            if self._most is None:
                self._balance += self._credit * plain
            self._most = self._credit * plain
        allowed = self._balance + ALLOWANCE * seconds
        if self._most is not None:
            allowed = min(allowed, self._most)
            saved = min(self._balance, SAVED * self._most) - self._most
            self._balance = self._most + saved * KEPT if saved > 0 else self._balance
        self._balance = max(self._balance, allowed)

    def book(self, gained: float) -> None:
        """Below 0: lost."""
        self._balance += gained
