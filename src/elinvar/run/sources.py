"""Sources: drafters as speculation has them, with what is known of each and whom it follows.

One that reads the target's states costs time for every token that it follows, prompts first, long before it
says anything. So it follows a request from its beginning or not at all, and lets go of all when its account
is empty: steps are then what they are without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from elinvar.base.drafts import DraftStats
from elinvar.ops.chances import Chances
from elinvar.run.accounts import CREDIT, CREDIT_TO_FOLLOW, Account
from elinvar.run.costs import OLD, Mean
from elinvar.run.drafters.api import Drafter, Seen


class Source:
    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.chances = Chances()
        self.account = Account(CREDIT_TO_FOLLOW if drafter.reads_hidden else CREDIT)
        self.stats = DraftStats(drafter.name)
        self._took: Mean | None = None
        """Of one that is not instant: seconds for each draft of the longest chain."""
        self._thought = 0
        """How often it was thought of."""
        self._followed: set[int] = set()
        """Rows whose states it reads."""
        self._may_guess: Callable[[int], bool] | None = getattr(drafter, "may_guess", None)

    def start(self, row: int) -> None:
        if self.drafter.reads_hidden and self.account.can_begin:
            self._followed.add(row)

    def forget(self, row: int) -> None:
        self.chances.forget(row)
        if self.follows(row):
            self._followed.discard(row)
            self._charge(lambda: self.drafter.forget(row))

    def draft_s(self) -> float:
        """Seconds that a longer chain takes for each draft; nothing until that is known, so that it is
        tried, and again when it was not for long."""
        self._thought += 1
        if self._took is not None and self._thought - self._took.at > OLD:
            self._took = None
        return self._took.value if self._took is not None and self._took.is_settled else 0.0

    def drafted(self, seconds: float, most: int) -> None:
        """A proposal of chains of so many drafts took so long."""
        if self._took is None:
            self._took = Mean(seconds / most, self._thought)
        else:
            self._took.add(seconds / most, self._thought, 0.125)

    def follows(self, row: int) -> bool:
        return not self.drafter.reads_hidden or row in self._followed

    def may_guess(self, row: int) -> bool:
        """Whether it is worth asking of this row at all."""
        return self.follows(row) and (self._may_guess is None or self._may_guess(row))

    def reads(self, row: int) -> bool:
        return row in self._followed

    def observe(self, seen: Seen, shown_s: float) -> float:
        """Seconds that it took, and is charged with. shown_s: what it took to have states that only
        drafters read."""
        if self.drafter.reads_hidden:
            seen = self._of_followed(seen)
            if not seen.items:
                return 0.0
            self.account.book(-shown_s)
        return self._charge(lambda: self.drafter.observe(seen))

    def _charge(self, work: Callable[[], None]) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        work()
        took = time.perf_counter() - began
        self.account.book(-took)
        self.stats.seconds += took
        return took

    def _of_followed(self, seen: Seen) -> Seen:
        followed = [i for i, item in enumerate(seen.items) if item.row in self._followed]
        if len(followed) == len(seen.items):
            return seen
        return replace(
            seen,
            items=[seen.items[i] for i in followed],
            sampled=[seen.sampled[i] for i in followed],
            firsts=[seen.firsts[i] for i in followed],
        )

    def pass_by(self, seconds: float, plain: float | None = None) -> None:
        """As an account has it; who lost too much follows nobody any more."""
        self.account.pass_by(seconds, plain)
        if self._followed and not self.account.is_open:
            for row in list(self._followed):
                self.forget(row)
