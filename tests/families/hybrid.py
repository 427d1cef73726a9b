"""Layers with a recurrent state beside attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import DeltaConfig, MoEConfig, RopeConfig
from families.base import LLAMA, Case

QWEN3_NEXT = replace(
    LLAMA,
    family="qwen3_next",
    num_layers=4,
    layer_kinds=("linear", "linear", "full", "linear"),
    rope={"full": RopeConfig(10_000.0, 8)},
    delta=DeltaConfig(key_heads=2, heads=4, key_dim=16, value_dim=24, taps=4),
    moe=MoEConfig(8, 3, 32, (0, 1, 3), renormalise=True, shared_ff_dim=64, shared_gate=True),
)

DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MOE: dict[str, Any] = {
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}

ENGINES = (QWEN3_NEXT,)


def _next(**settings: Any) -> Case:
    return Case("qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig", DELTA | MOE | settings)


CASES = {
    "qwen3-next": _next(mlp_only_layers=[1]),
    "qwen3-next-dense": _next(
        decoder_sparse_step=5,
        tie_word_embeddings=True,
        linear_num_value_heads=2,
        linear_conv_kernel_dim=3,
        layer_types=None,
        full_attention_interval=3,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.5
        },
    ),
}  # fmt: skip
