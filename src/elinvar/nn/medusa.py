"""Medusa heads: from the state that a target's head gets they guess the tokens after the next one, each
head at another distance (Cai et al., 2024).

Legend: L rows, D dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elinvar.ops.api import F32, Ops
from elinvar.ops.layout import Weight


@dataclass(frozen=True, slots=True)
class MedusaHead:
    blocks: Sequence[tuple[Weight, F32 | None]]
    """x + silu(w x + b), one after the other."""
    head: Weight
    """[V, D]"""


class MedusaHeads:
    def __init__(self, heads: Sequence[MedusaHead], ops: Ops) -> None:
        self.heads, self.ops = heads, ops

    @property
    def num_heads(self) -> int:
        return len(self.heads)

    def logits(self, h_LD: F32, head: int) -> F32:
        """[L, V] of the token that comes 2 + head behind the one that h is of."""
        one, ops = self.heads[head], self.ops
        for w, bias in one.blocks:
            h_LD = ops.add(h_LD, ops.activate(ops.linear(h_LD, (w,), bias), "silu"))
        return ops.linear(h_LD, (one.head,))
