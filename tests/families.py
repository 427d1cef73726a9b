"""Every family of the registry in miniature: a configuration for engines with random weights, and
configurations for transformers to build. A family that is in the registry and not here fails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from elinvar.base.config import LatentConfig, ModelConfig, RopeConfig

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

MISTRAL = replace(GEMMA3, family="mistral", embed_scale=1.0, activation="silu", tied_head=False)
QWEN3 = replace(LLAMA, family="qwen3")
DEEPSEEK = replace(
    LLAMA,
    family="deepseek",
    num_kv_heads=1,
    head_dim=40,
    rope={"full": RopeConfig(10000.0, 8)},
    latent=LatentConfig(rank=32, nope_dim=32, rope_dim=8, value_dim=16, q_rank=32),
)

ENGINES: dict[str, ModelConfig] = {c.family: c for c in (LLAMA, GEMMA3, MISTRAL, QWEN3, DEEPSEEK)}
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
FULL_AND_SLIDING = ["full_attention", "sliding_attention", "full_attention"]


def _llama(**settings: Any) -> Case:
    return Case("llama", "LlamaForCausalLM", "LlamaConfig", settings)


def _gemma3(**settings: Any) -> Case:
    plain = {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24}
    return Case("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", plain | settings)


LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 12,
    "head_dim": 12,
    "v_head_dim": 16,
    "first_k_dense_replace": 3,
}


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
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"rope_parameters": LLAMA3}),
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
    "gemma3": _gemma3(),
    "gemma3-linear": _gemma3(rope_parameters=LINEAR8, head_dim=32),
    "gemma3-types": _gemma3(num_hidden_layers=3, layer_types=FULL_AND_SLIDING),
    "deepseek2": Case(
        "deepseek", "DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT | {"q_lora_rank": None}
    ),
    "deepseek3": Case(
        "deepseek",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LATENT | {"q_lora_rank": 40, "v_head_dim": 32},
    ),
}
