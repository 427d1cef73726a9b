"""What a drafter is: it guesses the tokens that follow, and is told what came.

A draft is accepted where it is the token that the target samples, so a drafter decides how fast an
answer comes and never what it is. It may be wrong, late or silent. What it proposes it should draw as the
target does, with the same parameters and the same noise (`Rows.sample_args`): two distributions that are
alike then choose the same token, at every temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elinvar.base.plan import PlanItem
from elinvar.ops.api import F32


@dataclass(slots=True)
class Ask:
    """A row whose last known token is to be computed in this step."""

    row: int
    num_tokens: int
    """Known ones: rows.token_ids[row, :num_tokens]. The first draft would be at index num_tokens, and
    the row's blocks reach as far as `most` drafts."""
    most: int
    """Drafts that are wanted, at most."""
    least: float = 0.0
    """Drafts are not verified where they and those before them are less likely to be accepted."""


@dataclass(slots=True)
class Guess:
    """A chain of drafts; empty where there is no guess."""

    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    """Of each, what the drafter thinks of its being accepted if those before it are: 0 to 1. Need not be
    right, only tell likelier from less likely: it is held against what came."""
    is_allowed: bool = False
    """The row's grammar was asked, and allows these tokens."""

    def first(self, count: int) -> Guess:
        """So many of them."""
        if len(self.tokens) <= count:
            return self
        return Guess(self.tokens[:count], self.chances[:count], self.is_allowed)


@dataclass(slots=True)
class Seen:
    """A step that was computed, drafts verified. Also those with prompts, and the ends of waves."""

    items: Sequence[PlanItem]
    """Their spans with the drafts that were verified, which are the last `num_drafts` tokens."""
    sampled: Sequence[Sequence[int]]
    """Of each item: the accepted drafts and the token after them; empty where it samples nothing."""
    hidden: F32 | None
    """[T, D] of all tokens after the last norm, where the drafter `reads_hidden`; valid until the next
    forward."""
    firsts: Sequence[int]
    """Where each item's tokens begin in it."""


class Drafter(Protocol):
    """Who has a method `may_guess(row) -> bool` besides is asked in steps alone where it is true of some row:
    to be asked and say nothing takes time, too."""

    name: str
    """In metrics and records."""
    is_instant: bool
    """Guesses cost microseconds: it is asked before the number of drafts is decided, others after."""
    reads_hidden: bool
    """Then it sees the rows that it follows from their first token on, and is asked for them alone."""

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """A guess for each. What it writes to the model's caches lies behind the known tokens."""
        ...

    def observe(self, seen: Seen) -> None: ...

    def forget(self, row: int) -> None:
        """The row is nobody's, or somebody else's, from now on; its tokens are still there."""
        ...
