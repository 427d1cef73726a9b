"""Matrices on the device: each group that a model multiplies by at once is joined at its first use."""

from __future__ import annotations

import torch

from elinvar.ops.arguments import Experts
from elinvar.ops.layout import Weight
from elinvar.ops.triton.matrices import Matrix, from_weight, join, stack


class Matrices:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._joined: dict[tuple[Weight, ...], list[Matrix]] = {}

    def clear(self, dtype: torch.dtype) -> None:
        """Those of another model, computed in another dtype, follow."""
        self.dtype = dtype
        self._joined.clear()

    def joined(self, weights: tuple[Weight, ...]) -> list[Matrix]:
        """One matrix where they can be joined."""
        found = self._joined.get(weights)
        if found is None:
            found = [from_weight(w, self.dtype, self.device) for w in weights]
            whole = join(found) if len(found) > 1 else None
            found = self._joined[weights] = found if whole is None else [whole]
        return found

    def one(self, w: Weight) -> Matrix:
        return self.joined((w,))[0]

    def experts(self, experts: Experts) -> tuple[Matrix, Matrix]:
        """Gate above up, and down, of all experts."""
        if experts.handle is None:
            both = [self._pair(*pair) for pair in zip(experts.gates, experts.ups, strict=True)]
            downs = [from_weight(w, self.dtype, self.device) for w in experts.downs]
            experts.handle = stack(both), stack(downs)
        handle: tuple[Matrix, Matrix] = experts.handle
        return handle

    def _pair(self, gate: Weight, up: Weight) -> Matrix:
        parts = [from_weight(w, self.dtype, self.device) for w in (gate, up)]
        whole = join(parts)
        assert whole is not None, "gate and up are of one kind"
        return whole
