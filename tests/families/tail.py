"""The long tail: families that put known parts together otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import RopeConfig
from families.base import FULL_AND_SLIDING, LLAMA, YARN, Case
from families.deepseek import DEEPSEEK
from families.gemma import GEMMA3

OLMO2 = replace(GEMMA3, family="olmo2", embed_scale=1.0, activation="silu", tied_head=False)

GLM4_MOE = replace(
    LLAMA,
    family="glm4_moe",
    rope={"full": RopeConfig(10000.0, 8)},
    moe=replace(DEEPSEEK.moe, num_groups=1, top_groups=1),
)


def _glm4_moe(**settings: Any) -> Case:
    plain = {
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 2.5,
    }
    return Case("glm4_moe", "Glm4MoeForCausalLM", "Glm4MoeConfig", plain | settings)


ENGINES = (OLMO2, GLM4_MOE)

CASES = {
    "glm4-moe": _glm4_moe(use_qk_norm=True, attention_bias=True, n_shared_experts=2),
    "glm4-moe-groups": _glm4_moe(
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        first_k_dense_replace=2,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    "olmo2": Case("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
    "olmo2-tied": Case(
        "olmo2",
        "Olmo2ForCausalLM",
        "Olmo2Config",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": YARN},
    ),
    "olmo3": Case(
        "olmo2", "Olmo3ForCausalLM", "Olmo3Config", {"num_hidden_layers": 5, "sliding_window": 8}
    ),
    "olmo3-yarn": Case(
        "olmo2",
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {
            "sliding_window": 40,
            "layer_types": FULL_AND_SLIDING,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
}
