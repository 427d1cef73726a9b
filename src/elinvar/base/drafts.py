"""What drafters did, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

DRAFTERS = ("forced", "suffix", "mtp", "early-exit", "model", "aside")
"""By name. What they are is said in run/drafters."""
OF_DRAFT_MODELS = "model", "aside"
"""Those that need one: as part of the step, or in a process of its own."""
MOST_PLACES = 32


@dataclass(slots=True)
class DraftStats:
    """Of one drafter, since the engine started."""

    name: str
    num_drafts: int = 0
    """Chains that were verified."""
    num_drafted: int = 0
    """Tokens of theirs."""
    num_accepted: int = 0
    seconds: float = 0.0
    """That proposing took, of what was verified and what was not."""
    by_place: list[int] = field(default_factory=lambda: [0] * MOST_PLACES)
    """Accepted drafts by their place in a chain."""

    def book(self, drafted: int, accepted: int) -> None:
        self.num_drafts += 1
        self.num_drafted += drafted
        self.num_accepted += accepted
        for place in range(min(accepted, MOST_PLACES)):
            self.by_place[place] += 1
