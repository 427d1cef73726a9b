"""Several streams side by side (AltUp, Baykal et al., 2023), as Gemma 3n has them: a layer computes on
the first, and predicts and corrects the others.

A projection of low rank goes around attention (LAuReL, Menghani et al., 2024). Every layer has an
embedding of each token of its own. The last layers read keys and values of earlier ones, and some MLPs
let only the largest activations through.

Legend: T tokens of this step, L rows that need logits, D model dim, S streams, P dims of a layer's own
embeddings, N = P times the layers, C factors of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import ModelConfig
from elinvar.nn.attention import Step, kv_groups
from elinvar.nn.decoder import ByLayer, Decoder
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache
from elinvar.ops.layout import Weight, pack_float


class SharedAttention:
    """As in nn/attention.py, with a norm of values as well; or queries alone, on the keys and values
    that another layer wrote."""

    def __init__(self, config: ModelConfig, i: int, w: Mapping[str, Any], ops: Ops) -> None:
        assert config.streams is not None
        kinds, own = config.layer_kinds, config.streams.kv_layers
        kind = self.kind = kinds[i]
        self.cache = i if i < own else max(j for j in range(own) if kinds[j] == kind)
        self.group = kv_groups(config).index(kind)
        self.window = config.window if kind == "sliding" else None
        self.qkv = tuple(w[name] for name in "qkv" if name in w)
        self.out, self.q_gain, self.k_gain = (w["o"],), w["q_norm"], w.get("k_norm")
        self.v_gain = np.ones(config.head_dim, np.float32)
        self.config, self.ops = config, ops

    def __call__(self, h_TD: F32, step: Step, kv: Sequence[Any]) -> F32:
        ops, c, batch, cache = self.ops, self.config, step.batch, kv[self.cache]
        x_TN = ops.linear(h_TD, self.qkv)
        rope, heads, slots = step.rope[self.kind], c.num_heads, batch.slot_mapping[self.group]
        if self.k_gain is None:
            q = ops.rope_queries(x_TN, batch.positions, rope, heads, self.q_gain, c.norm_eps)
        else:
            gains = self.q_gain, self.k_gain, c.norm_eps, self.v_gain
            q = ops.rope_write(x_TN, batch.positions, rope, cache, slots, heads, *gains)
        where = self.kind, self.group, c.attn_scale, self.window
        return ops.linear(step.attend(ops, q, cache, *where), self.out)


class AltUp:
    """How the streams of a layer depend on each other: by factors of each token."""

    def __init__(self, w: Mapping[str, Any], num_streams: int, eps: float, ops: Ops) -> None:
        s, d = num_streams, len(w["router_norm"])
        self.router, self.ops = (w["altup_router"],), ops
        self.norm = RMSNorm(w["router_norm"] / np.float32(d), eps, ops)
        # predicted[o] = x[o] + sum of c[o, j] x[j]
        self.predicting = _matrix(w["altup_predict"].reshape(s * s, s))
        self.same = np.eye(s, dtype=np.float32).reshape(-1)
        # corrected[o] = predicted[o] + (1 + c[o]) (y - predicted[0]), over the predicted ones and y
        c_SS = w["altup_correct"].reshape(s, s)
        of_SS = np.zeros((s, s + 1, s), np.float32)
        of_SS[:, 0], of_SS[:, s] = -c_SS, c_SS
        plus_SS = np.eye(s, s + 1, dtype=np.float32)
        plus_SS[:, 0] -= 1
        plus_SS[:, s] = 1
        self.correcting, self.plus = _matrix(of_SS.reshape(-1, s)), plus_SS.reshape(-1)

    def predict(self, xs_TD: Sequence[F32]) -> Sequence[F32]:
        coefs_TC = self.ops.linear(self._routed(xs_TD[0]), self.predicting, self.same)
        return list(self.ops.mix(xs_TD, coefs_TC))

    def correct(self, predicted_TD: Sequence[F32], y_TD: F32) -> Sequence[F32]:
        coefs_TC = self.ops.linear(self._routed(y_TD), self.correcting, self.plus)
        return list(self.ops.mix([*predicted_TD, y_TD], coefs_TC))

    def _routed(self, x_TD: F32) -> F32:
        return self.ops.softcap(self.ops.linear(self.norm(x_TD), self.router), 1.0)


def _matrix(w_NK: F32) -> tuple[Weight]:
    return (pack_float("f32", np.ascontiguousarray(w_NK)),)


class StreamLayer:
    def __init__(self, config: ModelConfig, i: int, w: Mapping[str, Any], ops: Ops) -> None:
        assert config.streams is not None
        c = config.streams

        def norm(name: str) -> RMSNorm:
            return RMSNorm(w[name], config.norm_eps, ops)

        self.attn_norm, self.attn_post = norm("attn_norm"), norm("attn_post_norm")
        self.mlp_norm, self.mlp_post = norm("mlp_norm"), norm("mlp_post_norm")
        self.laurel_norm, self.own_norm = norm("laurel_norm"), norm("own_norm")
        self.attention = SharedAttention(config, i, w, ops)
        self.altup = AltUp(w, c.num_streams, config.norm_eps, ops)
        self.w, self.ops, self.activation = w, ops, config.activation
        self.deviations, self.own_at = c.deviations[i], i * c.own_dim
        self.scale = w["altup_scale"][None] if c.scaled else None

    def __call__(
        self, xs_TD: Sequence[F32], own_TN: F32, step: Step, kv: Sequence[Any]
    ) -> Sequence[F32]:
        ops, w = self.ops, self.w
        xs_TD = self.altup.predict(xs_TD)
        h_TD = self.attn_norm(xs_TD[0])
        low_TD = ops.linear(ops.linear(h_TD, (w["laurel_left"],)), (w["laurel_right"],))
        low_TD = ops.add(h_TD, self.laurel_norm(low_TD))
        a_TD = ops.add(xs_TD[0], self.attn_post(self.attention(h_TD, step, kv)))
        a_TD = ops.scale(ops.add(a_TD, low_TD), 0.5**0.5)
        y_TD = ops.add(a_TD, self.mlp_post(self._mlp(self.mlp_norm(a_TD))))
        first_TD, *others_TD = self.altup.correct(xs_TD, y_TD)
        g_TD = first_TD if self.scale is None else ops.mul(first_TD, self.scale)
        g_TP = ops.activate(ops.linear(g_TD, (w["own_gate"],)), self.activation)
        o_TD = ops.linear(ops.mul(g_TP, own_TN, self.own_at), (w["own_out"],))
        o_TD = self.own_norm(o_TD)
        return [first_TD, *(ops.add(x_TD, o_TD) for x_TD in others_TD)]

    def _mlp(self, x_TD: F32) -> F32:
        ops, w = self.ops, self.w
        if self.deviations is None:
            h_TF = ops.gated_linear(x_TD, w["gate"], w["up"], self.activation)
        else:
            g_TF = ops.sparsify(ops.linear(x_TD, (w["gate"],)), self.deviations)
            h_TF = ops.mul(ops.activate(g_TF, self.activation), ops.linear(x_TD, (w["up"],)))
        return ops.linear(h_TF, (w["down"],))


class StreamDecoder(Decoder):
    """The frame: embeddings become streams, and streams one again."""

    def __init__(
        self,
        config: ModelConfig,
        w: Mapping[str, Any],
        ops: Ops,
        layers: Sequence[StreamLayer],
        norm: RMSNorm,
    ) -> None:
        super().__init__(config, w, ops, (), norm)
        assert config.streams is not None
        self.streams, self.blocks = config.streams, layers
        others = range(1, config.streams.num_streams)
        self.spread = [(w[f"altup.{i}.spread"],) for i in others]
        self.gather = [(w[f"altup.{i}.gather"],) for i in others]
        self.own_embed, self.own_project = w["own_embed"], (w["own_project"],)
        self.own_norm = RMSNorm(w["own_project_norm"], config.norm_eps, ops)

    def hidden_by_layer(
        self, batch: ForwardBatch, kv: Sequence[LayerCache], all_tokens: bool = False
    ) -> ByLayer:
        ops = self.ops
        step, x_TD = self.step(batch), self.embedded(batch)
        own_TN = self._own(batch, x_TD)
        xs_TD: Sequence[F32] = [
            x_TD,
            *(ops.match_rms(ops.linear(x_TD, w), x_TD) for w in self.spread),
        ]
        for block in self.blocks:
            xs_TD = block(xs_TD, own_TN, step, kv)
            if block is not self.blocks[-1]:
                yield
        rows = (x_TD if all_tokens else batch.where_logits(x_TD) for x_TD in xs_TD)
        first_LD, *others_LD = rows
        sum_LD = first_LD
        for x_LD, w in zip(others_LD, self.gather, strict=True):
            sum_LD = ops.add(sum_LD, ops.match_rms(ops.linear(x_LD, w), first_LD))
        return self.next_norms[-1](ops.scale(sum_LD, 1 / len(xs_TD)))

    def _own(self, batch: ForwardBatch, x_TD: F32) -> F32:
        """[T, L P]: what each layer gets of each token."""
        ops, own_dim = self.ops, self.streams.own_dim
        embedded_TN = ops.embed(batch.input_ids, self.own_embed, own_dim**0.5)
        x_TN = ops.scale(ops.linear(x_TD, self.own_project), self.config.dim**-0.5)
        x_TN = self.own_norm(x_TN.reshape(-1, own_dim)).reshape(x_TN.shape)
        return ops.scale(ops.add(x_TN, embedded_TN), 0.5**0.5)
