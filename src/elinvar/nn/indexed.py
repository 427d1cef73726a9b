"""Sparse attention over latents (DeepSeek-AI, 2025: DeepSeek V3.2; GLM-5): an index of a few small
heads says which keys each token attends to. Its keys have a group of the cache to themselves, after
that of the latents. While no more keys are seen than may be chosen, all are, and the bits are those of
latent attention.

Legend: T tokens of this step, D model dim, N inputs of the query, K keys chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import IndexConfig, KVDtype, KVSpec, ModelConfig
from elinvar.nn.attention import Step
from elinvar.nn.decoder import ByLayer
from elinvar.nn.mla import EPS, LatentAttention, LatentWeights
from elinvar.nn.mtp import MTPDecoder
from elinvar.ops.api import F32, I32, Ops
from elinvar.ops.caches import KVLayer, LayerCache
from elinvar.ops.layout import Weight

GROUP = 1
"""Of the index's keys, in block tables and slot mappings."""


@dataclass(slots=True, eq=False)
class IndexWeights:
    index_q: Weight
    """[heads * dim, N]; the first dims of a head are rotated."""
    index_k: Weight
    """[dim, D]"""
    index_norm: F32
    index_norm_bias: F32
    index_weights: Weight
    """[heads, D]: what a head's word counts for a token."""


class IndexedAttention(LatentAttention):
    """kv: the latents, and the index's keys or None for a layer without an index."""

    def __init__(
        self, config: ModelConfig, weights: LatentWeights, index: IndexWeights | None, ops: Ops
    ) -> None:
        super().__init__(config, weights, ops)
        assert config.index is not None
        self.index: IndexConfig = config.index
        self.index_weights = index

    def __call__(self, h_TD: F32, step: Step, kv: Any) -> F32:
        latents, keys = kv
        input_TN = self._query_input(h_TD)
        if self.index_weights is not None:
            step.chosen = self._choose(self.index_weights, h_TD, input_TN, step, keys)
        assert step.chosen is not None
        starts, _, tables, positions = step.where("full", 0)
        c_TN = self.ops.sparse_attention(
            self._queries(h_TD, input_TN, step, latents),
            latents,
            starts,
            tables,
            positions,
            step.chosen,
            self.scale,
        )
        return self._values(c_TN)

    def _choose(self, w: IndexWeights, h_TD: F32, input_TN: F32, step: Step, keys: KVLayer) -> I32:
        """The published scores are these times constants, which order nothing."""
        ops, c, batch = self.ops, self.index, step.batch
        k_TD = ops.linear(h_TD, (w.index_k,))
        k_TD = ops.layer_norm(k_TD, w.index_norm, w.index_norm_bias, EPS)
        q_THD = ops.rope_write(
            ops.concat(ops.linear(input_TN, (w.index_q,)), k_TD),
            batch.positions,
            step.rope["full"],
            keys,
            batch.slot_mapping[GROUP],
            c.heads,
            None,
            None,
            EPS,
        )
        starts, _, tables, positions = step.where("full", GROUP)
        return ops.index_select(
            q_THD,
            ops.linear(h_TD, (w.index_weights,)),
            keys,
            starts,
            tables,
            positions,
            min(c.top_k, batch.num_positions),
            step.first,
        )


class IndexedDecoder(MTPDecoder):
    """With heads for drafts or without. Its caches: the latents of all layers and heads, then the keys
    of those with an index, which all heads have."""

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        latents, keys = super().kv_specs(kv_dtype)
        first, count = len(latents.layers), len(keys.layers) + len(self.heads)
        return latents, replace(keys, layers=tuple(range(first, first + count)))

    def hidden_by_layer(
        self, batch: ForwardBatch, kv: Sequence[LayerCache], all_tokens: bool = False
    ) -> ByLayer:
        return super().hidden_by_layer(batch, self._pairs(kv), all_tokens)

    def draft(
        self, batch: ForwardBatch, before_TD: F32, kv: Sequence[LayerCache], head: int = 0
    ) -> F32:
        return super().draft(batch, before_TD, self._pairs(kv), head)

    def _pairs(self, kv: Sequence[LayerCache]) -> list[Any]:
        """What IndexedAttention wants of each layer and head."""
        count, c = self.config.num_layers, self.config.index
        assert c is not None
        total = count + len(self.heads)
        keys = dict(zip((*c.layers, *range(count, total)), kv[total:], strict=True))
        return [(latents, keys.get(i)) for i, latents in enumerate(kv[:total])]
