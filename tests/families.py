"""Every family of the registry in miniature: a configuration for engines with random weights, and
configurations for transformers to build. A family that is in the registry and not here fails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from elinvar.base.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig

VOCAB = 288
"""Of the tiny engines: a tokenizer of bytes, and some."""

LLAMA = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ff_dim=96,
    max_context=512,
    norm_eps=1e-5,
    layer_kinds=("full", "full"),
    rope={"full": RopeConfig(10000.0, 16)},
    attn_scale=0.25,
)
GEMMA3 = replace(
    LLAMA,
    family="gemma3",
    num_layers=3,
    layer_kinds=("sliding", "full", "sliding"),
    rope={"full": RopeConfig(10000.0, 16), "sliding": RopeConfig(1000.0, 16)},
    window=40,
    embed_scale=0.5,
    activation="gelu_tanh",
    tied_head=True,
)
GEMMA2 = replace(
    GEMMA3,
    family="gemma2",
    rope=dict.fromkeys(("full", "sliding"), RopeConfig(10000.0, 16)),
    attn_softcap=1.5,
    final_softcap=2.5,
)

MISTRAL = replace(GEMMA3, family="mistral", embed_scale=1.0, activation="silu", tied_head=False)
QWEN3 = replace(LLAMA, family="qwen3")
PHI3 = replace(LLAMA, family="phi3", rope={"full": RopeConfig(10000.0, 8)})
GRANITE = replace(
    LLAMA, family="granite", embed_scale=3.0, residual_scale=0.5, logit_scale=0.25, attn_scale=0.125
)
GLM = replace(LLAMA, family="glm", rope={"full": RopeConfig(10000.0, 8)})

NEOX = replace(
    LLAMA,
    family="gpt_neox",
    num_kv_heads=4,
    rope={"full": RopeConfig(10000.0, 4)},
    activation="gelu",
    parallel=True,
)
PHI = replace(NEOX, family="phi", activation="gelu_tanh", num_kv_heads=2)
STARCODER2 = replace(MISTRAL, family="starcoder2", activation="gelu_tanh", tied_head=True)
GPT2 = replace(
    PHI, family="gpt2", num_kv_heads=4, rope={"full": RopeConfig(1.0, 0)}, parallel=False
)
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

MIXTRAL = replace(LLAMA, family="mixtral", moe=MoEConfig(4, 2, 96, (0, 1), renormalise=True))
QWEN2_MOE = replace(
    LLAMA, family="qwen2_moe", moe=MoEConfig(9, 4, 32, (1,), shared_ff_dim=64, shared_gate=True)
)
QWEN3_MOE = replace(LLAMA, family="qwen3_moe", moe=MoEConfig(24, 5, 32, (0, 1)))

ENGINES: dict[str, ModelConfig] = {
    c.family: c
    for c in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        replace(LLAMA, family="qwen2"),
        QWEN3,
        PHI3,
        GRANITE,
        GLM,
        replace(GLM, family="glm4"),
        STARCODER2,
        PHI,
        NEOX,
        GPT2,
        DEEPSEEK,
        GEMMA2,
        GEMMA3,
    )
}
"""By family: what the tests of the contract run."""


@dataclass(frozen=True)
class Case:
    """A model that transformers makes, with random weights and every switch of the family on."""

    family: str
    architecture: str
    """Class of the model in transformers."""
    config: str
    """Class of its configuration."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Besides SIZES."""


SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR8 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GRANITE_SCALES = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.1,
    "logits_scaling": 4.0,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
FULL_AND_SLIDING = ["full_attention", "sliding_attention", "full_attention"]


def _llama(**settings: Any) -> Case:
    return Case("llama", "LlamaForCausalLM", "LlamaConfig", settings)


def _gemma2(**settings: Any) -> Case:
    plain = {"sliding_window": 8, "query_pre_attn_scalar": 24}
    return Case("gemma2", "Gemma2ForCausalLM", "Gemma2Config", plain | settings)


def _gemma3(**settings: Any) -> Case:
    plain = {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24}
    return Case("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", plain | settings)


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


def _qwen_moe(name: str, **settings: Any) -> Case:
    family = {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}[name]
    plain = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
    shared = {"shared_expert_intermediate_size": 80} if name == "Qwen2Moe" else {}
    return Case(family, f"{name}ForCausalLM", f"{name}Config", plain | shared | settings)


def _deepseek(version: int, **settings: Any) -> Case:
    name = f"DeepseekV{version}"
    plain = LATENT | {"q_lora_rank": 40}
    return Case("deepseek", f"{name}ForCausalLM", f"{name}Config", plain | settings)


CASES: dict[str, Case] = {
    "llama": _llama(tie_word_embeddings=False),
    "llama-tied": _llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-3": _llama(rope_parameters=LLAMA3, head_dim=24, num_key_value_heads=1),
    "mistral": Case("mistral", "MistralForCausalLM", "MistralConfig", {"sliding_window": 8}),
    "mistral-full": Case(
        "mistral", "MistralForCausalLM", "MistralConfig", {"sliding_window": None, "head_dim": 24}
    ),
    "ministral": Case(
        "mistral",
        "MinistralForCausalLM",
        "MinistralConfig",
        {"sliding_window": 40, "layer_types": FULL_AND_SLIDING},
    ),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    "qwen2-sliding": Case(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": Case("phi3", "Phi3ForCausalLM", "Phi3Config", {"sliding_window": 8}),
    "phi3-longrope": Case(
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0],
                "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 16.0],
            },
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Case("granite", "GraniteForCausalLM", "GraniteConfig", GRANITE_SCALES),
    "granite-tied": Case(
        "granite",
        "GraniteForCausalLM",
        "GraniteConfig",
        GRANITE_SCALES | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "glm": Case("glm", "GlmForCausalLM", "GlmConfig"),
    "glm-plain": Case("glm", "GlmForCausalLM", "GlmConfig", {"attention_bias": False}),
    "glm4": Case("glm4", "Glm4ForCausalLM", "Glm4Config"),
    "glm4-tied": Case(
        "glm4", "Glm4ForCausalLM", "Glm4Config", {"tie_word_embeddings": True, "head_dim": 32}
    ),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"rope_parameters": LLAMA3}),
    "qwen3-tied": Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3-sliding": Case(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "head_dim": 32,
        },
    ),
    "starcoder2": Case(
        "starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 8}
    ),
    "starcoder2-plain": Case(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "starcoder2-full": Case("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config"),
    "phi": Case("phi", "PhiForCausalLM", "PhiConfig", {"partial_rotary_factor": 0.25}),
    "phi-yarn": Case(
        "phi", "PhiForCausalLM", "PhiConfig", {"rope_parameters": YARN, "hidden_act": "relu2"}
    ),
    "gpt-neox": Case("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gpt-neox-serial": Case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    ),
    "gpt2": Case("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2_SIZES),
    "gpt2-untied": Case(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2_SIZES | {"tie_word_embeddings": False, "n_inner": 112, "activation_function": "relu2"},
    ),
    "gemma2": _gemma2(attn_logit_softcapping=1.5, final_logit_softcapping=2.5),
    "gemma2-no-caps": _gemma2(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=32,
        layer_types=FULL_AND_SLIDING,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
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
    "gemma3": _gemma3(),
    "gemma3-linear": _gemma3(rope_parameters=LINEAR8, head_dim=32),
    "gemma3-types": _gemma3(num_hidden_layers=3, layer_types=FULL_AND_SLIDING),
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
    "deepseek3-dense": _deepseek(3, q_lora_rank=None, first_k_dense_replace=3),
}
