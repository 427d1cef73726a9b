"""DeepSeek: latent attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import IndexConfig, LatentConfig, MoEConfig, RopeConfig
from families.base import LLAMA, Case

DEEPSEEK = replace(
    LLAMA,
    family="deepseek",
    num_kv_heads=1,
    head_dim=40,
    rope={"full": RopeConfig(10000.0, 8)},
    latent=LatentConfig(rank=32, nope_dim=32, rope_dim=8, value_dim=16, q_rank=32),
    moe=MoEConfig(
        12,
        3,
        32,
        (1,),
        scoring="sigmoid",
        renormalise=True,
        scaling=2.5,
        biased=True,
        num_groups=4,
        top_groups=2,
        shared_ff_dim=64,
    ),
)

DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 12,
    "head_dim": 12,
    "v_head_dim": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}


def _deepseek(version: int, **settings: Any) -> Case:
    name = f"DeepseekV{version}"
    plain = LATENT | {"q_lora_rank": 40}
    return Case("deepseek", f"{name}ForCausalLM", f"{name}Config", plain | settings)


# Fewer keys than the tests' sequences have, and more than their first tokens see.
SPARSE = replace(
    DEEPSEEK,
    family="deepseek_v32",
    num_layers=3,
    layer_kinds=("full",) * 3,
    index=IndexConfig(heads=4, head_dim=16, top_k=24, layers=(0, 1, 2)),
)
GLM_SPARSE = replace(
    SPARSE, family="glm_moe_dsa", index=replace(SPARSE.index, layers=(0, 2), top_k=9)
)


def _sparse(name: str, family: str, **settings: Any) -> Case:
    """Many index heads: none of them having a word for a key would be a tie."""
    index = {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 20}
    plain = LATENT | {"q_lora_rank": 40} | index
    return Case(family, f"{name}ForCausalLM", f"{name}Config", plain | settings)


ENGINES = (DEEPSEEK, SPARSE, GLM_SPARSE)

CASES = {
    "deepseek2-lite": _deepseek(2, q_lora_rank=None, n_shared_experts=2),
    "deepseek2": _deepseek(
        2,
        rope_parameters=DEEPSEEK_YARN | {"mscale": 0.707},
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
        n_shared_experts=1,
        v_head_dim=32,
    ),
    "deepseek3": _deepseek(
        3, n_group=4, topk_group=2, tie_word_embeddings=True, rope_parameters=DEEPSEEK_YARN
    ),
    "deepseek32": _sparse(
        "DeepseekV32", "deepseek_v32", n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN
    ),
    "deepseek32-few": _sparse(
        "DeepseekV32",
        "deepseek_v32",
        n_group=1,
        topk_group=1,
        index_topk=7,
        index_n_heads=13,
        tie_word_embeddings=True,
    ),
    "glm-dsa": _sparse("GlmMoeDsa", "glm_moe_dsa", rms_norm_eps=1e-5),
    "glm-dsa-shared": _sparse(
        "GlmMoeDsa",
        "glm_moe_dsa",
        index_topk=40,
        index_head_dim=12,
        indexer_types=["full", "shared", "full"],
    ),
    "deepseek3-dense": _deepseek(3, q_lora_rank=None, first_k_dense_replace=3),
}
