"""Gated delta-net layers (Yang, Kautz and Hatamizadeh, 2024): linear attention whose memory is a
matrix a head. Each token decays it, corrects what it says of the token's key, and reads it.

Legend: T tokens of this step, D model dim, C channels of the convolution (queries, keys, values),
V value dims of all heads, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elinvar.base.config import ModelConfig
from elinvar.nn.attention import Step, kv_groups
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import StateLayer
from elinvar.ops.layout import Weight


@dataclass(slots=True, eq=False)
class DeltaWeights:
    delta_q: Weight
    delta_k: Weight
    delta_v: Weight
    delta_z: Weight
    """[V, D]: gates the output."""
    delta_b: Weight
    """[H, D]: how much of a correction is made."""
    delta_a: Weight
    """[H, D]: how fast the memory decays, with a_log and dt_bias [H]."""
    a_log: F32
    dt_bias: F32
    conv_q: F32
    """[channels taps], as those that follow."""
    conv_k: F32
    conv_v: F32
    head_norm: F32
    """[value dim of a head]"""
    delta_o: Weight


class DeltaNet:
    def __init__(self, config: ModelConfig, weights: DeltaWeights, ops: Ops) -> None:
        assert config.delta is not None
        self.channels = config.delta.channels
        self.group = kv_groups(config).index("linear")
        self.eps, self.w, self.ops = config.norm_eps, weights, ops
        w = weights
        self.inputs = (w.delta_q, w.delta_k, w.delta_v, w.delta_z, w.delta_b, w.delta_a)
        # Channels lie in lanes.
        taps = np.concatenate([w.conv_q, w.conv_k, w.conv_v]).reshape(self.channels, -1)
        self.taps_KC = np.ascontiguousarray(taps.T)

    def __call__(self, h_TD: F32, step: Step, state: StateLayer) -> F32:
        """Goes on from the sequences' states and leaves those after the tokens -> [T, D]."""
        ops, w, batch = self.ops, self.w, step.batch
        where = batch.query_start_loc, batch.seq_lens, batch.block_tables[self.group]
        x_TN = ops.linear(h_TD, self.inputs)
        qkv_TC = ops.causal_conv(x_TN, self.taps_KC, state, *where)
        o_TV = ops.delta_rule(qkv_TC, x_TN, w.a_log, w.dt_bias, state, *where)
        o_TV = ops.gated_rms_norm(o_TV, x_TN, self.channels, w.head_norm, self.eps)
        return ops.linear(o_TV, (w.delta_o,))
