"""The ops that compute, and what each costs (cost.py, cost_caches.py)."""

from __future__ import annotations

from collections.abc import Callable

from elinvar.ops import cost
from elinvar.ops import cost_caches as caches
from elinvar.ops.cost import Cost

COSTS: dict[str, Callable[..., Cost]] = {
    function.__name__: function
    for function in (
        *(cost.embed, cost.linear, cost.gated_linear, cost.gated, cost.lora, cost.head_linear),
        *(cost.route, cost.moe, cost.latent_query, cost.pool, cost.sample, cost.score),
        *(cost.spread,),
        *(cost.rms_norm, cost.add_rms_norm, cost.layer_norm, cost.add_layer_norm, cost.match_rms),
        *(cost.add, cost.concat, cost.scale, cost.scale_heads, cost.mul, cost.mix),
        *(cost.softcap, cost.activate, cost.sparsify, cost.gated_rms_norm, cost.sigmoid_gate),
        *(caches.rope_write, caches.rope_queries, caches.latent_write, caches.attention),
        *(caches.index_select, caches.sparse_attention, caches.block_shares),
        *(caches.causal_conv, caches.delta_rule),
    )
}
"""By the op's name: every op of `Ops` that computes."""
