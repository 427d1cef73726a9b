"""Layers with a recurrent state beside attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import DeltaConfig, MoEConfig, RopeConfig
from families.base import LLAMA, SIZES, Case

QWEN3_NEXT = replace(
    LLAMA,
    family="qwen3_next",
    num_layers=4,
    layer_kinds=("linear", "linear", "full", "linear"),
    rope={"full": RopeConfig(10_000.0, 8)},
    delta=DeltaConfig(key_heads=2, heads=4, key_dim=16, value_dim=24, taps=4),
    moe=MoEConfig(8, 3, 32, (0, 1, 3), renormalise=True, shared_ff_dim=64, shared_gate=True),
)

LAYER_TYPES = ["linear_attention", "full_attention", "linear_attention"]
DELTA: dict[str, Any] = {
    "layer_types": LAYER_TYPES,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    # A first token's output is (q k) v, normed: where q k is near 0 a smaller one shows rounding alone.
    "rms_norm_eps": 1e-4,
}
MOE: dict[str, Any] = {
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}

QWEN3_5 = replace(QWEN3_NEXT, family="qwen3_5", moe=None, tied_head=True)

ENGINES = (QWEN3_NEXT, QWEN3_5)


def _next(**settings: Any) -> Case:
    return Case("qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig", DELTA | MOE | settings)


def _seeing(name: str, settings: dict[str, Any], tied: bool) -> Case:
    """As published: with a vision tower beside the text model, whose settings lie inside."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_position_embeddings"), 16)
    vision = sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": SIZES["hidden_size"]}
    return Case(
        "qwen3_5",
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        settings | {"tie_word_embeddings": tied},
        around={"vision_config": vision, "tie_word_embeddings": tied},
    )


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
    "qwen3-5": Case(
        "qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", DELTA | {"tie_word_embeddings": True}
    ),
    "qwen3-5-moe": Case(
        "qwen3_5", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
        DELTA | MOE | {"intermediate_size": None},
    ),
    "qwen3-5-seeing": _seeing("Qwen3_5", DELTA | {"layer_types": ["linear_attention"] * 2 + ["full_attention"]}, False),
    "qwen3-5-moe-seeing": _seeing("Qwen3_5Moe", DELTA | MOE, True),
}  # fmt: skip
