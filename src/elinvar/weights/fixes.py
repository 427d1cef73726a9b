"""Fixes: what turns a stored tensor into its canonical form, and back (weights.rules says which
weight of a family needs which)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.weights.quants import dequantize
from elinvar.weights.tensor import BLOCKS, HostTensor


class Fix(Protocol):
    """An invertible change between a stored tensor (its part, if the rule names one) and its
    canonical form. Shape stays, but in TransposeHeads; a matrix also keeps its stored type. Fixes
    are frozen dataclasses: their repr names them."""

    def apply(self, tensor: HostTensor) -> HostTensor: ...

    def invert(self, tensor: HostTensor) -> HostTensor: ...


@dataclass(frozen=True, slots=True)
class UnpermuteRows:
    """Rows of q or k, or elements of their biases, from interleaved rotary pairs (2i, 2i+1) to
    half-split ones (i, i + R/2): llama.cpp's converter stores them so for the llama architecture, and
    GLM is trained so. Whole rows move, so it works on quantised blocks as they lie."""

    num_heads: int
    """Heads of this matrix: num_kv_heads for k."""
    rotary: int = 0
    """R, the rows of a head that are rotated; 0: all."""
    last: bool = False
    """They are a head's last rows, as DeepSeek has them, not its first ones."""

    def apply(self, tensor: HostTensor) -> HostTensor:
        return self._reorder(tensor, self.order(tensor.shape[0]))

    def invert(self, tensor: HostTensor) -> HostTensor:
        return self._reorder(tensor, np.argsort(self.order(tensor.shape[0])))

    def order(self, num_rows: int) -> NDArray[np.int64]:
        """Which stored row each row is."""
        heads = np.arange(num_rows).reshape(self.num_heads, -1)
        rotary = self.rotary or heads.shape[1]
        turned = heads[:, -rotary:] if self.last else heads[:, :rotary]
        pairs = turned.reshape(self.num_heads, -1, 2)
        turned[:] = pairs.swapaxes(1, 2).reshape(turned.shape)
        return heads.reshape(-1)

    def _reorder(self, tensor: HostTensor, order: NDArray[np.int64]) -> HostTensor:
        if len(tensor.shape) > 1:
            return replace(tensor, data=tensor.data[order])
        elements = tensor.data.reshape(len(order), -1)[order]
        return replace(tensor, data=elements.reshape(1, -1))


@dataclass(frozen=True, slots=True)
class TransposeHeads:
    """Every head's rows [n, k] to [k, n]. What is quantised along k cannot be turned as it lies: it
    becomes float32 (see load_weights)."""

    num_heads: int

    def apply(self, tensor: HostTensor) -> HostTensor:
        rows, k = tensor.shape
        if tensor.matrix is not None or BLOCKS[tensor.dtype][0] > 1:
            values = dequantize(tensor).view(np.uint8)
            tensor = HostTensor(tensor.name, tensor.shape, "F32", values)
        stack = HostTensor(
            tensor.name, (self.num_heads, rows // self.num_heads, k), tensor.dtype, tensor.data
        )
        turned = transpose(stack)
        return HostTensor(
            tensor.name, (self.num_heads * k, rows // self.num_heads), tensor.dtype, turned.data
        )

    def invert(self, tensor: HostTensor) -> HostTensor:
        return self.apply(tensor)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what becomes `shape`."""
        rows, k = shape
        return self.num_heads * k, rows // self.num_heads


@dataclass(frozen=True, slots=True)
class AddOne:
    """Gains stored as g - 1 (Gemma in Hugging Face form) to g, in float32."""

    def apply(self, tensor: HostTensor) -> HostTensor:
        return f32_tensor(tensor.name, dequantize(tensor) + np.float32(1))

    def invert(self, tensor: HostTensor) -> HostTensor:
        return f32_tensor(tensor.name, dequantize(tensor) - np.float32(1))


def transpose(tensor: HostTensor) -> HostTensor:
    """The last two dims the other way round. Raises ModelError for a type of blocks."""
    size = element_bytes(tensor)
    *stack, n, k = tensor.shape
    data = tensor.data.reshape(-1, n, k, size).swapaxes(1, 2)
    return HostTensor(
        tensor.name, (*stack, k, n), tensor.dtype, np.ascontiguousarray(data).reshape(-1, n * size)
    )


def element_bytes(tensor: HostTensor) -> int:
    elements, size = BLOCKS[tensor.dtype]
    if elements > 1:
        raise ModelError(
            f"Tensor {tensor.name} is stored as (in, out) and cannot be {tensor.dtype}."
        )
    return size


def f32_tensor(name: str, values: NDArray[np.float32]) -> HostTensor:
    """A vector in memory, as a file would hold it."""
    data = np.ascontiguousarray(values, "<f4").reshape(1, -1).view(np.uint8)
    return HostTensor(name, values.shape, "F32", data)
