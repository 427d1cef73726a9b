"""ChatGLM, whose code was published beside the weights: GLM's layers under other names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from families.base import Case, Published, Tensors
from families.llama import GLM

NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "model.layers": "transformer.encoder.layers",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn.q_proj": "self_attention.query_key_value",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def chatglm_tensors(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """q, k and v in one matrix."""
    result = {}
    for name, values in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            others = (tensors[name.replace(".q_", each)] for each in (".k_", ".v_"))
            values = np.concatenate([values, *others])
        for old, new in NAMES.items():
            name = name.replace(old, new)
        result[name] = values
    return result


def _config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": config["num_hidden_layers"],
        "padded_vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "kv_channels": config["head_dim"],
        "num_attention_heads": config["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_ratio": config["rope_parameters"]["rope_theta"] / 10_000,
        "add_qkv_bias": config["attention_bias"],
        "rmsnorm": True,
        "original_rope": True,
    }


def _case(architecture: str, **settings: Any) -> Case:
    published = Published(architecture, _config, chatglm_tensors)
    return Case("chatglm", "GlmForCausalLM", "GlmConfig", settings, published=published)


ENGINES = (replace(GLM, family="chatglm"),)

CASES = {
    "chatglm": _case("ChatGLMModel", attention_bias=True),
    "chatglm-plain": _case(
        "ChatGLMForConditionalGeneration",
        attention_bias=False,
        head_dim=24,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500_000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
}
