"""The long tail: families that put known parts together otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import MoEConfig, RopeConfig
from families.base import FULL_AND_SLIDING, LLAMA, LLAMA3, YARN, Case
from families.deepseek import DEEPSEEK, LATENT
from families.gemma import GEMMA3
from families.llama import GRANITE, GRANITE_SCALES

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


NOPE = {"full": RopeConfig(10000.0, 0), "sliding": RopeConfig(10000.0, 16)}


MINIMAX = MoEConfig(9, 3, 32, (0, 1), scoring="sigmoid", renormalise=True, biased=True)

ENGINES = (
    replace(LLAMA, family="hunyuan"),
    replace(LLAMA, family="gemma", activation="gelu_tanh", embed_scale=3.0, tied_head=True),
    replace(DEEPSEEK, family="glm4_moe_lite"),
    replace(LLAMA, family="olmoe", moe=MoEConfig(6, 2, 96, (0, 1))),
    replace(
        LLAMA,
        family="ernie_moe",
        moe=MoEConfig(6, 2, 32, (1,), renormalise=True, biased=True, shared_ff_dim=64),
    ),
    replace(LLAMA, family="ernie"),
    replace(LLAMA, family="stablelm", rope={"full": RopeConfig(10000.0, 4)}),
    replace(LLAMA, family="minimax_m2", moe=MINIMAX, rope={"full": RopeConfig(10000.0, 8)}),
    replace(GRANITE, family="granite_moe", moe=MoEConfig(6, 2, 32, (0, 1), renormalise=True)),
    OLMO2,
    GLM4_MOE,
    replace(LLAMA, family="smollm3", unrotated=(1,)),
    replace(LLAMA, family="seed_oss"),
    replace(OLMO2, family="exaone4", rope=NOPE),
    replace(OLMO2, family="cohere", rope=NOPE, logit_scale=0.5, parallel=True, tied_head=True),
)


def _smollm3(**settings: Any) -> Case:
    return Case("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", settings)


def _seed_oss(**settings: Any) -> Case:
    return Case("seed_oss", "SeedOssForCausalLM", "SeedOssConfig", settings)


def _exaone4(**settings: Any) -> Case:
    return Case("exaone4", "Exaone4ForCausalLM", "Exaone4Config", settings)


def _cohere(**settings: Any) -> Case:
    return Case("cohere", "CohereForCausalLM", "CohereConfig", settings)


def _cohere2(**settings: Any) -> Case:
    return Case("cohere", "Cohere2ForCausalLM", "Cohere2Config", settings)


def _minimax_m2(**settings: Any) -> Case:
    plain = {"num_local_experts": 9, "num_experts_per_tok": 3, "intermediate_size": 48}
    return Case("minimax_m2", "MiniMaxM2ForCausalLM", "MiniMaxM2Config", plain | settings)


def _granite_moe(**settings: Any) -> Case:
    plain = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48}
    every = GRANITE_SCALES | plain | settings
    return Case("granite_moe", "GraniteMoeForCausalLM", "GraniteMoeConfig", every)


def _ernie(**settings: Any) -> Case:
    return Case("ernie", "Ernie4_5ForCausalLM", "Ernie4_5Config", settings)


def _stablelm(**settings: Any) -> Case:
    return Case("stablelm", "StableLmForCausalLM", "StableLmConfig", settings)


def _gemma(**settings: Any) -> Case:
    return Case("gemma", "GemmaForCausalLM", "GemmaConfig", settings)


def _glm4_moe_lite(**settings: Any) -> Case:
    plain = LATENT | {"q_lora_rank": 40, "qk_rope_head_dim": 12}
    plain = {k: v for k, v in plain.items() if k not in ("head_dim", "first_k_dense_replace")}
    every = plain | settings
    return Case("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", every)


def _olmoe(**settings: Any) -> Case:
    plain = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48}
    return Case("olmoe", "OlmoeForCausalLM", "OlmoeConfig", plain | settings)


def _ernie_moe(**settings: Any) -> Case:
    plain = {"moe_num_experts": 9, "moe_k": 3, "moe_intermediate_size": 48}
    return Case("ernie_moe", "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", plain | settings)


def _hunyuan(**settings: Any) -> Case:
    return Case("hunyuan", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", settings)


NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0, "alpha": 50.0}

CASES = {
    "hunyuan": _hunyuan(),
    "hunyuan-alpha": _hunyuan(
        rope_parameters=NTK_ALPHA, head_dim=32, tie_word_embeddings=True, num_key_value_heads=4
    ),
    "gemma": _gemma(),
    "gemma-untied": _gemma(tie_word_embeddings=False, head_dim=32, num_key_value_heads=1),
    "glm4-moe-lite": _glm4_moe_lite(),
    "glm4-moe-lite-groups": _glm4_moe_lite(
        n_group=4,
        topk_group=2,
        mlp_layer_types=["dense", "dense", "sparse"],
        tie_word_embeddings=True,
    ),
    "olmoe": _olmoe(),
    "olmoe-norm": _olmoe(norm_topk_prob=True, num_key_value_heads=4, tie_word_embeddings=True),
    "ernie-moe": _ernie_moe(),
    "ernie-moe-some": _ernie_moe(
        num_hidden_layers=5,
        moe_layer_start_index=0,
        moe_layer_end_index=3,
        moe_layer_interval=2,
        moe_num_shared_experts=0,
        tie_word_embeddings=False,
    ),
    "ernie": _ernie(),
    "ernie-untied": _ernie(head_dim=32, tie_word_embeddings=False, num_key_value_heads=1),
    "stablelm": _stablelm(use_qkv_bias=True),
    "stablelm-parallel": _stablelm(
        use_parallel_residual=True, partial_rotary_factor=0.5, tie_word_embeddings=True
    ),
    "minimax-m2": _minimax_m2(rotary_dim=8),
    "minimax-m2-tied": _minimax_m2(
        head_dim=32, tie_word_embeddings=True, num_key_value_heads=4, num_experts_per_tok=1
    ),
    "granite-moe": _granite_moe(),
    "granite-moe-tied": _granite_moe(tie_word_embeddings=True, num_experts_per_tok=6),
    "smollm3": _smollm3(num_hidden_layers=5),
    "smollm3-sliding": _smollm3(
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=8,
        tie_word_embeddings=False,
    ),
    "seed-oss": _seed_oss(),
    "seed-oss-plain": _seed_oss(attention_bias=False, head_dim=32, tie_word_embeddings=True),
    "exaone4": _exaone4(num_hidden_layers=5, sliding_window=8),
    "exaone4-full": _exaone4(
        sliding_window=None,
        layer_types=["full_attention"] * 3,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "cohere": _cohere(logit_scale=0.25),
    "cohere-untied": _cohere(num_key_value_heads=4, tie_word_embeddings=False),
    "cohere2": _cohere2(num_hidden_layers=5, sliding_window=8),
    "cohere2-types": _cohere2(
        sliding_window=40, layer_types=FULL_AND_SLIDING, logit_scale=1.5, tie_word_embeddings=False
    ),
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
