"""Multi-head latent attention (DeepSeek-AI, 2024) over the paged cache, always absorbed.

A token leaves one key for all heads: a normed latent c and a rotated k_pe. The model's keys and
values are W_uk c and W_uv c; here W_uk multiplies the query and W_uv the weighted latents, so that
attention walks the latents themselves, in prompts and in decoding alike: one arithmetic
(docs/design/009-latent-attention.md).

Legend: T tokens of this step, D model dim, H heads, R rank of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from elinvar.base.config import ModelConfig
from elinvar.nn.attention import Step
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import KVLayer
from elinvar.ops.layout import Weight

EPS = 1e-6
"""Of the norms inside; the configuration's is that of the norms of the stream."""


@dataclass(slots=True, eq=False)
class LatentWeights:
    kv_a: Weight
    """[R + rope, D]"""
    kv_norm: F32
    k_b: Weight
    """[H R, nope]: W_uk of each head, transposed."""
    v_b: Weight
    """[H v, R]: W_uv of each head."""
    o: Weight
    q: Weight
    """[H (nope + rope), D], or of q_rank instead of D where q_a leads there."""
    q_a: Weight | None = None
    q_norm: F32 | None = None


class LatentAttention:
    def __init__(self, config: ModelConfig, weights: LatentWeights, ops: Ops) -> None:
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.w, self.ops = weights, ops

    def __call__(self, h_TD: F32, step: Step, kv: KVLayer) -> F32:
        """Writes the tokens' latents to `kv`, then attends -> [T, D]."""
        q_THD = self._queries(h_TD, self._query_input(h_TD), step, kv)
        return self._values(step.attend(self.ops, q_THD, kv, "full", 0, self.scale))

    def _queries(self, h_TD: F32, input_TN: F32, step: Step, kv: KVLayer) -> F32:
        """Writes the tokens' latents to `kv` -> their queries [T, H, R + rope]."""
        ops, w, batch, rope_PD = self.ops, self.w, step.batch, step.rope["full"]
        key_TN = ops.linear(h_TD, (w.kv_a,))
        ops.latent_write(
            key_TN, batch.positions, rope_PD, kv, batch.slot_mapping[0], w.kv_norm, EPS
        )
        q_TN = ops.linear(input_TN, (w.q,))
        return ops.latent_query(q_TN, w.k_b, batch.positions, rope_PD, self.num_heads)

    def _values(self, c_TN: F32) -> F32:
        """From weighted latents to the stream."""
        return self.ops.linear(self.ops.head_linear(c_TN, self.w.v_b, self.num_heads), (self.w.o,))

    def _query_input(self, h_TD: F32) -> F32:
        if self.w.q_a is None or self.w.q_norm is None:
            return h_TD
        return self.ops.rms_norm(self.ops.linear(h_TD, (self.w.q_a,)), self.w.q_norm, EPS)
