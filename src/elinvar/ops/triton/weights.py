"""Matrices on the device: each group that a model multiplies by at once is joined at its first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from elinvar.ops.triton.sizes import matrix_bytes
from elinvar.ops.triton.tuned import Table


class Matrices:
    def __init__(
        self, device: torch.device, dtype: torch.dtype, tuned: Table | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        self._fit = tuned.fit if tuned else lambda w: w
        self._joined: dict[tuple[Weight, ...], list[Matrix]] = {}
        self._experts: dict[Experts, DeviceExperts] = {}

        self.told: Callable[[int], None] | None = None
        """Called with the bytes that were brought here since the last `clear`."""
        self._brought = 0

    def clear(self, dtype: torch.dtype) -> None:
        """Those of another model, computed in another dtype, follow; or of this one, again."""
        self.dtype = dtype
        self._joined.clear()
        self._experts.clear()
        self._brought = 0

    def _bring(self, w: Weight) -> Matrix:
        found = from_weight(w, self.dtype, self.device)
        self._brought += matrix_bytes(w.kind, w.shape)
        if self.told is not None:
            self.told(self._brought)
        return found

    def exchange(self, pairs: Sequence[tuple[Experts, Experts]]) -> bool:
        """All matrices hold other numbers, and of each pair the second takes the place of the first: what
        is here gets them, tensor by tensor. Whether all of them fit where they were."""
        fit = True
        for weights, held in self._joined.items():
            found = self._together(weights)
            if not _overwrite(_tensors(*held), _tensors(*found)):
                self._joined[weights], fit = found, False
        for old, new in pairs:
            experts = self._experts.pop(old, None)
            if experts is None:
                continue
            self._experts[new], stacked = experts, self._stacked(new)
            if not _overwrite(_of_experts(experts), _of_experts(stacked)):
                self._experts[new], fit = stacked, False
        return fit

    def joined(self, weights: tuple[Weight, ...]) -> list[Matrix]:
        """One matrix where they can be joined."""
        found = self._joined.get(weights)
        if found is None:
            found = self._joined[weights] = self._together(weights)
        return found

    def _together(self, weights: tuple[Weight, ...]) -> list[Matrix]:
        found = [self._bring(w) for w in weights]
        whole = join(found) if len(found) > 1 else None
        return [self._fit(w) for w in (found if whole is None else [whole])]

    def one(self, w: Weight) -> Matrix:
        return self.joined((w,))[0]

    def experts(self, experts: Experts) -> DeviceExperts:
        found = self._experts.get(experts)
        if found is None:
            found = self._experts[experts] = self._stacked(experts)
        return found

    def _stacked(self, experts: Experts) -> DeviceExperts:
        return DeviceExperts(
            self._fit(self._both(experts)),
            self._fit(stack(self._alike(experts.downs))),
            self._biases(experts.gate_bias, experts.up_bias),
            self._biases(experts.down_bias),
        )

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
        return [self._bring(w) for w in weights]

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


def _tensors(*matrices: Matrix) -> list[torch.Tensor | None]:
    return [tensor for m in matrices for tensor in (*m.tensors, m.factors)]


def _of_experts(e: DeviceExperts) -> list[torch.Tensor | None]:
    return [*_tensors(e.both, e.downs), e.both_bias, e.down_bias]


def _overwrite(held: Sequence[torch.Tensor | None], found: Sequence[torch.Tensor | None]) -> bool:
    """Whether they are of the same types and shapes, which say a matrix's kind; then those that are held
    have the numbers that were found."""
    if [_form(tensor) for tensor in held] != [_form(tensor) for tensor in found]:
        return False
    for to, tensor in zip(held, found, strict=True):
        if to is not None and tensor is not None:
            to.copy_(tensor)
    return True


def _form(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor.dtype, tensor.shape)
