"""Tunes attention on the GPU that is here (tuning.py says how it is chosen)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from elinvar.base.config import BLOCK_SIZE, KVDtype, KVSpec, ModelConfig
from elinvar.ops.triton.attention import attention, product_dtype, tile_of
from elinvar.ops.triton.caches import KVLayer, kv_layers
from elinvar.ops.triton.configs import Tile
from elinvar.ops.triton.sizes import Floats
from elinvar.ops.triton.tuner import Progress, Watched, quiet
from elinvar.ops.triton.tuning import Choice, tune_tile

LOADS = {1: True, 32: True, 8192: False}
"""Tokens of a step of attention over 8,192 keys, one a sequence where splits are shared."""
CONTEXT = 8192


_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True)
class Heads:
    """What of attention decides how it is cut, and how many heads there are."""

    heads: int
    kv_heads: int
    dims: int
    kind: KVDtype
    dtype: torch.dtype = torch.bfloat16
    """Of activations."""

    @property
    def product(self) -> torch.dtype:
        return product_dtype(self.dtype, self.kind)


def heads_of(config: ModelConfig, kind: KVDtype, floats: Floats) -> tuple[Heads, int] | None:
    """Those of a model, and how many layers have them; None where attention is over latents, which
    is cut in one way."""
    layers = sum(layer != "linear" for layer in config.layer_kinds)
    if config.latent is not None or not layers:
        return None
    shape = config.num_heads, config.num_kv_heads, config.head_dim
    return Heads(*shape, kind, _DTYPES[floats]), layers


def tiles(heads: Heads) -> list[Tile]:
    """Those that may be worth a look."""
    base = tile_of(heads.dims, heads.product, heads.kind)
    if base.rows < 64:
        return [base]
    talls = dict.fromkeys((base.rows, 128))
    return [Tile(base.rows, *cut) for cut in product(talls, (32, 64, 128), (1, 2, 3, 4))]


def tune_attention(
    heads: Heads,
    device: torch.device,
    progress: Progress = quiet,
    some: Sequence[Tile] = (),
) -> Choice:
    caches = {
        load: Filled(heads, load if shared else 1, CONTEXT, 1 if shared else load, device)
        for load, shared in LOADS.items()
    }
    times = Watched(progress)

    def time(tile: Tile, load: int) -> float:
        return times(tile, [caches[load].attend(1 if LOADS[load] else load, tile)])

    def holds(tile: Tile) -> bool:
        return same_attention(Filled(heads, 3, 2500, 70, device), tile)

    return tune_tile(some or tiles(heads), LOADS, time, holds)


def same_attention(cache: Filled, tile: Tile | None) -> bool:
    """Whether tokens have the bits of a prompt's, whose splits one program walks, when they are decoded,
    are drafts, or alone, and where programs share splits."""
    n = cache.q.shape[1]
    whole = cache.attend(n, tile, most=0)()
    counts = [count for count in (1, 2, 5, 33, n) if count <= n]
    found = [cache.attend(count, tile, most)() for count in counts for most in (0, None)]
    same = all(torch.equal(rows, whole[:, -rows.shape[1] :]) for rows in found)
    return same and torch.equal(cache.one(1).attend(n, tile)(), whole[1:2])


class Filled:
    """Random keys and values of `count` sequences of one length, in blocks that lie in no order, and
    queries of their last `tokens` tokens."""

    def __init__(
        self, heads: Heads, count: int, context: int, tokens: int, device: torch.device
    ) -> None:
        self.heads, self.context = heads, context
        per = -(-context // BLOCK_SIZE)
        spec = KVSpec("full", (0,), heads.kv_heads, heads.dims, heads.kind)
        made: Any = kv_layers(spec, per * count, device)
        self.kv: KVLayer = made[0]
        g = torch.Generator(device).manual_seed(0)
        for each in (self.kv.k, self.kv.v):
            if each.is_floating_point():
                each.normal_(generator=g)
            else:  # also codes of e4m3, for numbers below 4
                each.random_(0, 0x48, generator=g)
        for scales in (self.kv.k_scales, self.kv.v_scales):
            if scales is not None:
                scales.fill_(1 / 64)
        order = torch.randperm(per * count, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(count, per).to(device, torch.int32)
        shape = count, tokens, heads.heads, heads.dims
        self.q = torch.randn(shape, generator=g, device=device).to(heads.dtype)

    def one(self, sequence: int) -> Filled:
        """A batch of that one alone."""
        alone = copy(self)
        alone.q = self.q[sequence : sequence + 1]
        alone.tables = self.tables[sequence : sequence + 1].contiguous()
        return alone

    def attend(
        self, n: int, tile: Tile | None = None, most: int | None = None
    ) -> Callable[[], torch.Tensor]:
        """-> [count, n, H, D] of each sequence's last n tokens. most: see `attention`."""
        (count, _, h, d), device = self.q.shape, self.q.device
        starts = torch.arange(count + 1, device=device, dtype=torch.int32) * n
        at = torch.arange(self.context - n, self.context, device=device, dtype=torch.int32)
        q, where = (
            self.q[:, -n:].flatten(0, 1).contiguous(),
            (starts, self.tables, at.repeat(count)),
        )
        return lambda: attention(q, self.kv, *where, d**-0.5, tile=tile, most=most).view(
            count, n, h, d
        )
