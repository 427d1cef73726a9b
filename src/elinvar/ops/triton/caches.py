"""The cache of a layer on a GPU: keys and values, or recurrent states, in blocks of 32 slots.

As on a CPU a block holds all layers of a group together and takes `KVSpec.block_bytes`: it moves as
one piece. Here keys lie like values, a slot's dims side by side: matrix instructions want them so,
and a warp reads whole rows. What is written and read back: numbers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elinvar.base.config import DeltaConfig, KVDtype, KVSpec
from elinvar.ops.triton.device import DeviceBlocks

_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.uint8,  # bits of e4m3: torch and older chips know too little of the type
}


@dataclass(slots=True, eq=False)
class KVLayer:
    """Keys and values of one layer; the tensors are views of `blocks`."""

    dtype: KVDtype
    k: torch.Tensor
    """[B, H, 32, D padded to a multiple of 16]; what pads is never read"""
    v: torch.Tensor
    """The same; of latents the keys' own tensor, of which a value is the first `value_dim`."""
    head_dim: int
    value_dim: int
    blocks: DeviceBlocks
    k_scales: torch.Tensor | None = None
    """[B, H, 32] f32 of int8: what a key's codes are multiplied by; they lie behind the head's codes"""
    v_scales: torch.Tensor | None = None

    @property
    def keys_alone(self) -> bool:
        """Values are not stored: of latents, or there are none."""
        return self.k.data_ptr() == self.v.data_ptr()

    @property
    def turned_dims(self) -> int:
        """How many dims, 16 apart, of a key `rope_write` turns together (ops/api.py); 1: none."""
        whole, rest = divmod(self.head_dim, 16)
        return 1 if self.dtype != "int8" or self.keys_alone or rest else whole & -whole


@dataclass(slots=True, eq=False)
class StateLayer:
    """Recurrent states of one layer, a block each; f32."""

    config: DeltaConfig
    tails: torch.Tensor
    """[B, taps - 1, C] inputs of the convolution before the next one, oldest first."""
    states: torch.Tensor
    """[B, H, key dim, value dim padded to 16]"""
    blocks: DeviceBlocks


LayerCache = KVLayer | StateLayer


def kv_layers(
    spec: KVSpec, num_blocks: int, device: torch.device | str
) -> list[KVLayer] | list[StateLayer]:
    """One a layer of `spec`, zeroed: a slot that was never written holds numbers, which attention
    relies on (what it must not see it multiplies by 0)."""
    cache = torch.zeros((num_blocks, spec.block_bytes), dtype=torch.uint8, device=device)
    if spec.state is not None:
        return _state_layers(spec.state, cache, len(spec.layers))
    dtype = _DTYPES[spec.dtype]
    arrays = 1 if spec.latent_dim else 2
    heads = cache.view(num_blocks, len(spec.layers), arrays, spec.num_kv_heads, spec.head_bytes)
    size = spec.padded_dim * spec.block_size * dtype.itemsize
    vectors = heads[..., :size].view(dtype).unflatten(-1, (spec.block_size, spec.padded_dim))
    scales = heads[..., size:].view(torch.float32) if spec.dtype == "int8" else None
    dims = spec.head_dim, spec.latent_dim or spec.head_dim
    return [
        KVLayer(
            spec.dtype,
            vectors[:, i, 0],
            vectors[:, i, -1],
            *dims,
            DeviceBlocks(cache),
            *(None if scales is None else scales[:, i, which] for which in (0, -1)),
        )
        for i in range(len(spec.layers))
    ]


def _state_layers(c: DeltaConfig, cache: torch.Tensor, num_layers: int) -> list[StateLayer]:
    num_blocks = len(cache)
    floats = cache.view(torch.float32).view(num_blocks, num_layers, c.state_floats)
    tails = floats[..., : (c.taps - 1) * c.channels].unflatten(-1, (c.taps - 1, c.channels))
    shape = c.heads, c.key_dim, c.padded_dim
    states = floats[..., c.tail_floats :].unflatten(-1, shape)
    return [
        StateLayer(c, tails[:, i], states[:, i], DeviceBlocks(cache)) for i in range(num_layers)
    ]
