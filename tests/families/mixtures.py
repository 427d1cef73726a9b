"""Mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import MoEConfig
from families.base import LLAMA, Case

MIXTRAL = replace(LLAMA, family="mixtral", moe=MoEConfig(4, 2, 96, (0, 1), renormalise=True))

QWEN2_MOE = replace(
    LLAMA, family="qwen2_moe", moe=MoEConfig(9, 4, 32, (1,), shared_ff_dim=64, shared_gate=True)
)

QWEN3_MOE = replace(LLAMA, family="qwen3_moe", moe=MoEConfig(24, 5, 32, (0, 1)))


def _qwen_moe(name: str, **settings: Any) -> Case:
    family = {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}[name]
    plain = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
    shared = {"shared_expert_intermediate_size": 80} if name == "Qwen2Moe" else {}
    return Case(family, f"{name}ForCausalLM", f"{name}Config", plain | shared | settings)


ENGINES = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
)

CASES = {
    "mixtral": Case("mixtral", "MixtralForCausalLM", "MixtralConfig", {"sliding_window": None}),
    "mixtral-sliding": Case(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {"sliding_window": 8, "num_local_experts": 5, "num_experts_per_tok": 1},
    ),
    "qwen2-moe": _qwen_moe("Qwen2Moe"),
    "qwen2-moe-norm": _qwen_moe(
        "Qwen2Moe",
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=8,
        decoder_sparse_step=2,
    ),
    "qwen3-moe": _qwen_moe("Qwen3Moe", norm_topk_prob=True),
    "qwen3-moe-dense": _qwen_moe(
        "Qwen3Moe",
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=8,
        tie_word_embeddings=True,
    ),
}
