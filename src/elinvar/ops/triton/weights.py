"""Matrices on the device: each group that a model multiplies by at once is joined at its first use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from elinvar.ops.arguments import Experts, Lora, LoraPair
from elinvar.ops.layout import Weight, unpack
from elinvar.ops.triton.lora import Part
from elinvar.ops.triton.matrices import Matrix, from_weight, join, stack
from elinvar.ops.triton.matrices import dense as floats
from elinvar.ops.triton.moe import DeviceExperts
from elinvar.ops.triton.tuned import Table


class Matrices:
    def __init__(
        self, device: torch.device, dtype: torch.dtype, tuned: Table | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        self._fit = tuned.fit if tuned else lambda w: w
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
            found = [self._fit(w) for w in (found if whole is None else [whole])]
            self._joined[weights] = found
        return found

    def one(self, w: Weight) -> Matrix:
        return self.joined((w,))[0]

    def experts(self, experts: Experts) -> DeviceExperts:
        if experts.handle is None:
            experts.handle = DeviceExperts(
                self._fit(self._both(experts)),
                self._fit(stack(self._alike(experts.downs))),
                self._biases(experts.gate_bias, experts.up_bias),
                self._biases(experts.down_bias),
            )
        handle: DeviceExperts = experts.handle
        return handle

    def _both(self, experts: Experts) -> Matrix:
        """Gates above ups; what they come from is let go before downs come."""
        gates, ups = self._alike(experts.gates), self._alike(experts.ups)
        if gates[0].kind != ups[0].kind:
            gates, ups = self._alike(experts.gates, True), self._alike(experts.ups, True)
        both = [join(pair) for pair in zip(gates, ups, strict=True)]
        return stack([pair for pair in both if pair is not None])

    def _alike(self, weights: Sequence[Weight], dense: bool = False) -> list[Matrix]:
        """Matrices of one kind: where they come in several, numbers of the dtype."""
        if dense or len({w.kind for w in weights}) > 1:
            return [floats(self._floats(unpack(w)).to(self.dtype)) for w in weights]
        return [from_weight(w, self.dtype, self.device) for w in weights]

    def _biases(self, *parts: NDArray[np.float32] | None) -> torch.Tensor | None:
        """Side by side, where there are any."""
        found = [part for part in parts if part is not None]
        return self._floats(np.concatenate(found, axis=1)) if found else None

    def _floats(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

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
