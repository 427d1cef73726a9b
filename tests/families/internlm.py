"""InternLM and MiniCPM, whose code was published beside the weights: Llama and Granite under other
names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from families.base import LLAMA, Case, Published, Tensors
from families.deepseek import DEEPSEEK
from families.llama import GRANITE

INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_proj": "attention.wqkv",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "lm_head": "output",
}


def _internlm2_tensors(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A key-value head's queries, its keys, its values; then the next one's."""
    result, kv_heads = {}, config["num_key_value_heads"]
    for name, values in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [values, *(tensors[name.replace(".q_", each)] for each in (".k_", ".v_"))]
            by_head = [part.reshape(kv_heads, -1, part.shape[1]) for part in parts]
            values = np.concatenate(by_head, axis=1).reshape(-1, values.shape[1])
        for old, new in INTERNLM2_NAMES.items():
            name = name.replace(old, new)
        result[name] = values
    return result


def _internlm2_config(config: dict[str, Any]) -> dict[str, Any]:
    """As files were before transformers 5, with a scaling that begins beyond the context."""
    theta = config.pop("rope_parameters")["rope_theta"]
    return config | {
        "bias": False,
        "rope_theta": theta,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }


def _minicpm_config(config: dict[str, Any]) -> dict[str, Any]:
    scales = {
        "scale_emb": config.pop("embedding_multiplier"),
        "scale_depth": config.pop("residual_multiplier") * config["num_hidden_layers"] ** 0.5,
        "dim_model_base": config["hidden_size"] / config.pop("logits_scaling"),
    }
    return config | scales


def _same(config: dict[str, Any], tensors: Tensors) -> Tensors:
    return tensors


INTERNLM2 = Published("InternLM2ForCausalLM", _internlm2_config, _internlm2_tensors)
INTERNLM3 = Published("InternLM3ForCausalLM", dict, _same)
MINICPM = Published("MiniCPMForCausalLM", _minicpm_config, _same)


def _internlm2(**settings: Any) -> Case:
    return Case("internlm2", "LlamaForCausalLM", "LlamaConfig", settings, published=INTERNLM2)


def _internlm3(**settings: Any) -> Case:
    return Case("internlm3", "LlamaForCausalLM", "InternLM3Config", settings, published=INTERNLM3)


def _minicpm(**settings: Any) -> Case:
    plain = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.25,
        "logits_scaling": 4.0,
    }
    return Case(
        "minicpm", "GraniteForCausalLM", "GraniteConfig", plain | settings, published=MINICPM
    )


MINICPM3 = replace(
    DEEPSEEK, family="minicpm3", moe=None, embed_scale=3.0, residual_scale=0.5, logit_scale=0.25
)


def _minicpm3(**settings: Any) -> Case:
    plain = {"hidden_size": 64, "num_key_value_heads": 4, "dim_model_base": 16, "scale_emb": 6.0}
    latent = {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12}
    return Case("minicpm3", "MiniCPM3ForCausalLM", "MiniCPM3Config", plain | latent | settings)


ENGINES = (
    MINICPM3,
    replace(LLAMA, family="internlm2"),
    replace(LLAMA, family="internlm3"),
    replace(GRANITE, family="minicpm", attn_scale=0.25),
)

CASES = {
    "minicpm3": _minicpm3(q_lora_rank=40),
    "minicpm3-first": _minicpm3(q_lora_rank=40, scale_emb=12, dim_model_base=256),
    "minicpm3-untied": _minicpm3(q_lora_rank=None, v_head_dim=32, tie_word_embeddings=False),
    "internlm2": _internlm2(),
    "internlm2-grouped": _internlm2(num_attention_heads=8, head_dim=24),
    "internlm3": _internlm3(head_dim=32),
    "internlm3-tied": _internlm3(tie_word_embeddings=True),
    "minicpm": _minicpm(),
    "minicpm-tied": _minicpm(tie_word_embeddings=True, num_key_value_heads=4),
}
