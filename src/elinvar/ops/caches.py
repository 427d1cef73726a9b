"""The cache of a layer: keys and values, or recurrent states, in blocks."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from elinvar.base.config import DeltaConfig, KVDtype, KVSpec
from elinvar.ops.arguments import F32

_DTYPES = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "int8": np.int8}
_HUGE_FROM = 8 << 20
"""Bytes: a smaller cache is not worth pages of 2 MiB."""


class Blocks(Protocol):
    """The blocks of a group, each with all of its layers, as bytes."""

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        ...

    def read(self, block: int) -> memoryview:
        """What it holds, until the next call."""
        ...

    def write(self, block: int, fill: Callable[[memoryview], bool]) -> bool:
        """`fill` writes what it shall hold; what that returns. Where it is False, the block holds
        nothing of worth."""
        ...

    def copy(self, source: int, target: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class HostBlocks:
    array: NDArray[np.uint8]
    """[B, bytes]"""

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read(self, block: int) -> memoryview:
        return memoryview(self.array[block])

    def write(self, block: int, fill: Callable[[memoryview], bool]) -> bool:
        return fill(memoryview(self.array[block]))

    def copy(self, source: int, target: int) -> None:
        self.array[target] = self.array[source]


@dataclass(slots=True, eq=False)
class KVLayer:
    """Keys and values of one layer. Keys lie transposed in a block, so that a kernel holds 32
    keys in lanes; the last dim of values is padded to 16. bf16 is stored as uint16 bits. The scales
    of int8 lie behind the codes of their head in a block."""

    dtype: KVDtype
    k: NDArray[Any]
    """[B, H, D, 32]"""
    v: NDArray[Any]
    """[B, H, 32, D padded to a multiple of 16]; of latents a view of the keys, [B, H, 32, dims]"""
    blocks: HostBlocks
    k_scales: F32 | None = None
    """[B, H, 32] of int8: what a key's codes are multiplied by"""
    v_scales: F32 | None = None
    handle: Any = field(default=None, init=False, repr=False)
    """How a provider holds it, bound at its first use."""

    @property
    def vector_bytes(self) -> int:
        """Bytes of one key, or value, of a head."""
        scale = 0 if self.k_scales is None else self.k_scales.itemsize
        return self.k.shape[2] * self.k.itemsize + scale

    @property
    def keys_alone(self) -> bool:
        """Values are not stored: of latents, or there are none."""
        return self.k.ctypes.data == self.v.ctypes.data

    @property
    def value_dim(self) -> int:
        return min(self.k.shape[2], self.v.shape[3])


@dataclass(slots=True, eq=False)
class StateLayer:
    """Recurrent states of one layer, a block each."""

    config: DeltaConfig
    tails: F32
    """[B, taps - 1, C] inputs of the convolution before the next one, oldest first."""
    states: F32
    """[B, H, key dim, value dim padded to 16]"""
    blocks: HostBlocks
    handle: Any = field(default=None, init=False, repr=False)
    """How a provider holds it, bound at its first use."""


LayerCache = KVLayer | StateLayer


def new_kv_layers(spec: KVSpec, num_blocks: int) -> list[Any]:
    """One a layer of `spec`, zeroed: views of one array, in which a block's keys and values of all
    layers lie together. So a cache takes memory as its blocks are used, by large pages without
    waste, and a block can move as one piece. Layers with a recurrent state get StateLayers."""
    if spec.state is not None:
        return _new_state_layers(spec.state, len(spec.layers), num_blocks)
    dtype: Any = np.dtype(_DTYPES[spec.dtype])
    arrays = 1 if spec.latent_dim else 2
    heads = (num_blocks, len(spec.layers), arrays, spec.num_kv_heads)
    cache = _mapped((*heads, spec.head_bytes), np.uint8)
    size = spec.padded_dim * spec.block_size * dtype.itemsize
    elements = cache[..., :size].view(dtype)

    def matrices(rows: int, columns: int) -> NDArray[Any]:
        # Not reshape: of an axis of one it would forget how far apart the heads lie.
        strides = (*elements.strides[:-1], columns * dtype.itemsize, dtype.itemsize)
        return as_strided(elements, (*heads, rows, columns), strides)

    k = matrices(spec.padded_dim, spec.block_size)[..., : spec.head_dim, :]
    v = matrices(spec.block_size, spec.padded_dim)
    if spec.latent_dim:
        v = k[..., : spec.latent_dim, :].swapaxes(-1, -2)
    blocks = HostBlocks(cache.reshape(num_blocks, -1))
    scales = cache[..., size:].view(np.float32) if spec.dtype == "int8" else None
    return [
        KVLayer(
            spec.dtype,
            k[:, i, 0],
            v[:, i, -1],
            blocks,
            *(None if scales is None else scales[:, i, which] for which in (0, -1)),
        )
        for i in range(len(spec.layers))
    ]


def _new_state_layers(c: DeltaConfig, num_layers: int, num_blocks: int) -> list[StateLayer]:
    cache: F32 = _mapped((num_blocks, num_layers, c.state_floats), np.float32)
    tails = cache[..., : (c.taps - 1) * c.channels]
    tails = tails.reshape(num_blocks, num_layers, c.taps - 1, c.channels)
    states = cache[..., c.tail_floats :]
    states = states.reshape(num_blocks, num_layers, c.heads, c.key_dim, c.padded_dim)
    blocks = HostBlocks(cache.reshape(num_blocks, -1).view(np.uint8))
    return [StateLayer(c, tails[:, i], states[:, i], blocks) for i in range(num_layers)]


def _mapped(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeros in pages of their own: from the heap they could be memory used before, which zeroing
    touches."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
