"""Waves: chunks of prompts that go through the layers beside steps that decode, some layers a step
(layered prefill: Lee et al., 2025).

A chunk as small as one token may take longer through all layers, at depth, than streams should wait.
Cut by layers as well, a step's share of it is as small as one layer, and the chunk may be of a size
that computes well.
"""

from __future__ import annotations

from dataclasses import dataclass

from elinvar.base.plan import PlanItem
from elinvar.sched.request import Request


@dataclass(slots=True, eq=False)
class Underway:
    """A wave between its first step and its last. Its requests compute nothing else, and their
    tokens count as computed when it has ended."""

    requests: list[Request]
    items: list[PlanItem]
    """Of each request its span."""
    num_done: int = 0
    """Layers that committed steps took it through."""

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def depth(self) -> float:
        """Mean position of its tokens."""
        return mean_depth(self.items)


def mean_depth(items: list[PlanItem]) -> float:
    """Of the tokens of spans."""
    tokens = sum(item.num_tokens for item in items)
    products = sum(item.num_tokens * (2 * item.start + item.num_tokens) for item in items)
    return products / (2 * tokens) if tokens else 0.0
