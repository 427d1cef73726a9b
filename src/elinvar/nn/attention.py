"""Self-attention over the paged cache, and how layers are grouped by what they keep in it.

Legend: T tokens of this step, D model dim, N = (H + 2 Hkv) * head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, LayerKind, ModelConfig
from elinvar.ops.api import F32, I32, Ops
from elinvar.ops.caches import KVLayer
from elinvar.ops.layout import Weight

CACHE_OF: dict[LayerKind, LayerKind] = {
    **{"full": "full", "sliding": "sliding", "chunked": "full", "linear": "linear"}
}
"""Chunked layers share the blocks of the full ones and keep every key: their chunk only masks."""


def kv_groups(config: ModelConfig) -> tuple[LayerKind, ...]:
    """The kinds of cache that the model has, in the order of the batch's block tables."""
    order: tuple[LayerKind, ...] = ("full", "sliding", "linear")
    needed = {CACHE_OF[kind] for kind in config.layer_kinds}
    return tuple(kind for kind in order if kind in needed)


def kv_specs(config: ModelConfig, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
    """The cache that the model needs, one spec a kind of cache; where an index chooses keys, the
    index's keys follow as if they were of further layers."""
    if config.streams is not None:  # the others read what these wrote
        config = replace(config, layer_kinds=config.layer_kinds[: config.streams.kv_layers])
    specs = tuple(
        KVSpec(
            kind=kind,
            layers=tuple(i for i, k in enumerate(config.layer_kinds) if CACHE_OF[k] == kind),
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype,
            window=config.window if kind == "sliding" else None,
            latent_dim=config.latent.rank if config.latent else None,
            state=config.delta if kind == "linear" else None,
        )
        for kind in kv_groups(config)
    )
    if config.index is None:
        return specs
    (latents,), dims = specs, config.index.head_dim
    own = tuple(range(config.num_layers, config.num_layers + len(config.index.layers)))
    return latents, replace(latents, layers=own, head_dim=dims, latent_dim=dims)


@dataclass(slots=True)
class Step:
    """What every layer of a forward sees."""

    batch: ForwardBatch
    rope: dict[LayerKind, F32]
    """By layer kind: the rotary table [P, R]."""
    last_keys: I32 | None = None
    """[T] the last position that each token sees; None: its own."""
    temperature: dict[LayerKind, F32] = field(default_factory=dict)
    """By layer kind, of those that have one: the factors on queries [P]."""
    first: int = 0
    """Layers of this forward hold no keys before this position."""
    chosen: I32 | None = None
    """[T, K] the keys that the last layer with an index chose (nn/indexed.py)."""

    def where(self, kind: LayerKind, group: int) -> tuple[I32, I32, I32, I32]:
        """Where attention of a layer finds the keys that its tokens see: query_start_loc, seq_lens,
        block tables and, of each token, the last one that it sees."""
        batch = self.batch
        seen = batch.sight if kind == "full" and batch.sight is not None else batch
        last = seen.positions if self.last_keys is None else self.last_keys
        return seen.query_start_loc, seen.seq_lens, seen.block_tables[group], last

    def attend(
        self,
        ops: Ops,
        q_THD: F32,
        kv: KVLayer,
        kind: LayerKind,
        group: int,
        scale: float,
        window: int | None = None,
        *,
        softcap: float | None = None,
        sinks_H: F32 | None = None,
        chunk: int | None = None,
    ) -> F32:
        """`attention` of a layer; and of tokens that are watched what they attend to is noted."""
        if (watch := self.batch.watch) is not None and kind == "full":
            ops.block_shares(
                q_THD[watch.tokens],
                kv,
                watch.query_start_loc,
                self.batch.block_tables[group][watch.sequences],
                watch.positions,
                scale,
                watch.shares,
                softcap=softcap,
                sinks_H=sinks_H,
            )
        return ops.attention(
            q_THD,
            kv,
            *self.where(kind, group),
            scale,
            window,
            softcap=softcap,
            sinks_H=sinks_H,
            chunk=chunk,
            first=self.first,
        )


class Attention:
    """Grouped-query attention with rotary positions (Ainslie et al., 2023) of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        qkv: tuple[Weight, Weight, Weight],
        out: Weight,
        ops: Ops,
        q_gain: F32 | None = None,
        k_gain: F32 | None = None,
        qkv_bias: Sequence[F32] | None = None,
        out_bias: F32 | None = None,
        sinks: F32 | None = None,
        rotated_gain: F32 | None = None,
        gate: Weight | None = None,
    ) -> None:
        """q_gain, k_gain: [head_dim] gains of an RMS norm on every head of q and k, if any;
        sinks: [H] a score of each head that takes part in its softmax and has no value, if any;
        rotated_gain: [head_dim] of a norm on every head of q behind the rotation, if any;
        gate: [H head_dim, D] whose sigmoid multiplies what the heads give, if any."""
        kind = config.layer_kinds[layer]
        self.kind, self.rotated = kind, layer not in config.unrotated
        self.group = kv_groups(config).index(CACHE_OF[kind])
        self.window = config.window if kind == "sliding" else None
        self.chunk = config.attn_chunk if kind == "chunked" else None
        self.softcap, self.sinks = config.attn_softcap, sinks
        self.num_heads = config.num_heads
        self.scale = config.attn_scale
        self.eps = config.norm_eps
        self.qkv, self.out = qkv, (out,)
        self.gate = gate
        self.q_gain, self.k_gain, self.rotated_gain = q_gain, k_gain, rotated_gain
        self.qkv_bias = None if qkv_bias is None else np.concatenate(qkv_bias)
        self.out_bias = out_bias
        self.ops = ops

    def __call__(self, h_TD: F32, step: Step, kv: KVLayer) -> F32:
        """Writes the tokens' keys and values to `kv`, then attends -> [T, D]."""
        ops, group, batch = self.ops, self.group, step.batch
        qkv_TN = ops.linear(h_TD, self.qkv, self.qkv_bias)
        rope_PD = step.rope[self.kind]
        q_THD = ops.rope_write(
            qkv_TN,
            batch.positions,
            rope_PD if self.rotated else rope_PD[:, :0],
            kv,
            batch.slot_mapping[group],
            self.num_heads,
            self.q_gain,
            self.k_gain,
            self.eps,
        )
        if self.rotated_gain is not None:
            heads_TD = q_THD.reshape(-1, q_THD.shape[2])
            q_THD = ops.rms_norm(heads_TD, self.rotated_gain, self.eps).reshape(q_THD.shape)
        if (factors_P := step.temperature.get(self.kind)) is not None:
            q_THD = ops.scale_heads(q_THD, batch.positions, factors_P)
        o_TD = step.attend(
            ops,
            q_THD,
            kv,
            self.kind,
            group,
            self.scale,
            self.window,
            softcap=self.softcap,
            sinks_H=self.sinks,
            chunk=self.chunk,
        )
        if self.gate is not None:
            o_TD = ops.sigmoid_gate(o_TD, ops.linear(h_TD, (self.gate,)))
        return ops.linear(o_TD, self.out, self.out_bias)
