"""Llama, and those that add little to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import RopeConfig
from families.base import FULL_AND_SLIDING, LLAMA, LLAMA3, VISION, YARN, Case
from families.gemma import GEMMA3

MISTRAL = replace(GEMMA3, family="mistral", embed_scale=1.0, activation="silu", tied_head=False)

PHI3 = replace(LLAMA, family="phi3", rope={"full": RopeConfig(10000.0, 8)})

GRANITE = replace(
    LLAMA, family="granite", embed_scale=3.0, residual_scale=0.5, logit_scale=0.25, attn_scale=0.125
)

GLM = replace(LLAMA, family="glm", rope={"full": RopeConfig(10000.0, 8)})

GRANITE_SCALES = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.1,
    "logits_scaling": 4.0,
}


def _llama(**settings: Any) -> Case:
    return Case("llama", "LlamaForCausalLM", "LlamaConfig", settings)


ENGINES = (
    LLAMA,
    MISTRAL,
    PHI3,
    GRANITE,
    GLM,
    replace(GLM, family="glm4"),
)

CASES = {
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
    "ministral3": Case(
        "mistral",
        "Ministral3ForCausalLM",
        "Ministral3Config",
        {
            "rope_parameters": YARN
            | {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.4}
            | {"mscale": 1.0, "mscale_all_dim": 1.0}
        },
    ),
    "mistral3": Case(
        "mistral",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"model_type": "mistral", "sliding_window": None},
        around={"vision_config": VISION | {"model_type": "pixtral", "head_dim": 16}},
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
}
