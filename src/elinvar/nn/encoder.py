"""The frame that encoders share (Devlin et al., 2018): embeddings, layers with each norm behind its
part, and perhaps a head that scores. All tokens of a text see each other.

Legend: T tokens of this step, D model dim, L rows that are wanted, R texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, ModelConfig
from elinvar.nn.attention import Step, kv_specs
from elinvar.nn.decoder import Attends, Feeds
from elinvar.nn.norm import Norm
from elinvar.nn.rope import RopeTable
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache


class EncoderLayer:
    """x = norm(x + part(x)), for attention and then for the MLP."""

    def __init__(self, attention: Attends, norm: Norm, mlp: Feeds, mlp_norm: Norm) -> None:
        self.attention, self.norm, self.mlp, self.mlp_norm = attention, norm, mlp, mlp_norm

    def __call__(self, x_TD: F32, step: Step, kv: Any, last: bool) -> F32:
        a_TD = self.attention(x_TD, step, kv)
        if last:
            x_TD, a_TD = step.batch.where_logits(x_TD), step.batch.where_logits(a_TD)
        x_TD = self.norm.add(x_TD, a_TD)[1]
        return self.mlp_norm.add(x_TD, self.mlp(x_TD))[1]


class Encoder:
    """hidden(): token ids to vectors; scores(): a text's first vector to what the head says."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        ops: Ops,
        layers: Sequence[EncoderLayer],
        norm: Norm,
    ) -> None:
        """norm: of the embeddings."""
        assert config.encoder is not None
        self.config, self.encoder, self.ops = config, config.encoder, ops
        self.weights, self.layers, self.norm = weights, layers, norm
        self.ropes = {kind: RopeTable(config.rope[kind]) for kind in config.rope}

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        return kv_specs(self.config, kv_dtype)

    def hidden(self, batch: ForwardBatch, kv: Sequence[LayerCache]) -> F32:
        """Computes whole texts -> [L, D] of `batch.logit_rows`. Each layer leaves keys and values in
        its `kv` that nobody needs afterwards."""
        rope = {kind: table.upto(batch.num_positions) for kind, table in self.ropes.items()}
        step = Step(batch, rope, batch.last_keys)
        x_TD = self.norm(self.embedded(batch))
        for layer, cache in zip(self.layers, kv, strict=True):
            x_TD = layer(x_TD, step, cache, layer is self.layers[-1])
        return x_TD

    def embedded(self, batch: ForwardBatch) -> F32:
        """Words, types and positions, in this order of sums. Where there is one type every id has its
        row."""
        ops, w = self.ops, self.weights
        x_TD = ops.embed(batch.input_ids, w["embed"], 1.0)
        if "types" in w:
            assert batch.type_ids is not None
            x_TD = ops.add(x_TD, ops.embed(batch.type_ids, w["types"], 1.0))
        if "positions" in w:
            rows = batch.positions + self.encoder.first_position
            x_TD = ops.add(x_TD, ops.embed(rows, w["positions"], 1.0))
        return x_TD

    def scores(self, first_RD: F32) -> F32:
        """The head: linear, tanh, linear -> [R, labels]."""
        ops, w = self.ops, self.weights
        h_RD = ops.linear(first_RD, [w["pooler"]], w["pooler_bias"])
        h_RD = ops.softcap(h_RD, 1.0)  # which is tanh
        return ops.linear(h_RD, [w["labels"]], w["labels_bias"])
