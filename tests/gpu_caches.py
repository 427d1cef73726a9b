"""Caches of the provider `triton` with the contents of the oracle's, on a CPU under the interpreter."""

from __future__ import annotations

import numpy as np
import torch

from elinvar.base.config import KVSpec
from elinvar.ops import KVLayer as HostLayer
from elinvar.ops import ref_attention
from elinvar.ops.triton import caches
from sweeps import REF, normal


def torched(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


def random_caches(
    rng: np.random.Generator, spec: KVSpec, num_blocks: int
) -> tuple[HostLayer, caches.KVLayer]:
    """One layer's, filled by the oracle, and the same on the device."""
    [host] = REF.kv_layers(spec, num_blocks)
    shape = num_blocks * 32, spec.num_kv_heads, spec.head_dim
    slots = np.arange(num_blocks * 32, dtype=np.int32)
    ref_attention.write_keys(host, slots, normal(rng, *shape))
    if not host.keys_alone:
        ref_attention.write_values(host, slots, normal(rng, *shape))
    [kv] = caches.kv_layers(spec, num_blocks, "cpu")
    for mine, theirs in ((kv.k, host.k.swapaxes(-1, -2)), (kv.v, host.v)):
        if spec.latent_dim is None or mine is kv.k:
            [array] = torched(theirs[..., : spec.head_dim])
            mine[..., : spec.head_dim] = array.view(mine.dtype)
    if kv.k_scales is not None and kv.v_scales is not None:
        for mine, theirs in ((kv.k_scales, host.k_scales), (kv.v_scales, host.v_scales)):
            mine.copy_(torched(theirs)[0])
    return host, kv


def random_tables(rng: np.random.Generator, lengths: list[int]) -> tuple[np.ndarray, int]:
    """Blocks of sequences in an order of no meaning [R, B], and how many blocks there are."""
    need = [-(-n // 32) for n in lengths]
    ids = rng.permutation(sum(need) + 1).astype(np.int32)
    tables = np.full((len(lengths), max(need)), -1, np.int32)
    for row, count, first in zip(tables, need, np.cumsum([0, *need]), strict=False):
        row[:count] = ids[first : first + count]
    return tables, sum(need) + 1
