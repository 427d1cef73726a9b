"""Matrices on the device: each group that a model multiplies by at once is joined at its first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from elinvar.ops.arguments import Experts, Lora, LoraPair
from elinvar.ops.layout import Weight, unpack
from elinvar.ops.triton.lora import Part
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

    def lora(self, lora: Lora) -> list[Part]:
        if lora.handle is None:
            columns = zip(lora.columns, lora.pairs, strict=True)
            lora.handle = [self._part(column, pairs) for column, pairs in columns]
        handle: list[Part] = lora.handle
        return handle

    def _part(self, column: int, pairs: Sequence[LoraPair | None]) -> Part:
        some = next(pair for pair in pairs if pair is not None)
        most = max(pair.a.shape[0] for pair in pairs if pair is not None)
        rank = triton.next_power_of_2(most)
        a = torch.zeros((len(pairs), rank, some.a.shape[1]))
        b = torch.zeros((len(pairs), some.b.shape[0], rank))
        for i, pair in enumerate(pairs):
            if pair is not None:
                own = pair.a.shape[0]
                a[i, :own] = torch.from_numpy(unpack(pair.a)) * pair.scale
                b[i, :, :own] = torch.from_numpy(unpack(pair.b))
        return Part(column, a.to(self.device), b.to(self.device))
