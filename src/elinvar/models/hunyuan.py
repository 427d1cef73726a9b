"""Hunyuan, dense (Tencent, 2025), and its translators: Llama's blocks with norms on heads of q and k after
they were rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from elinvar.base.config import ModelConfig, RopeConfig
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    by_layer,
    mlp_rules,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import RMSNorm
from elinvar.nn.rope import power
from elinvar.ops.api import Ops
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

HEAD_NORMS = {
    "q_norm": ("self_attn.query_layernorm", "attn_q_norm"),
    "k_norm": ("self_attn.key_layernorm", "attn_k_norm"),
}


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    ones = np.ones(config.head_dim, np.float32)

    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        # Without gains norm and rotation commute; and q * a . k * b = q * a * b . k.
        gain = w["q_norm"] * w["k_norm"]
        qkv = w["q"], w["k"], w["v"]
        attention = Attention(config, i, qkv, w["o"], ops, k_gain=ones, rotated_gain=gain)
        mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
        return Block(norm(w["attn_norm"]), attention, norm(w["mlp_norm"]), mlp)

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Decoder(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(NORMS, config.dim),
        *norm_rules(HEAD_NORMS, config.head_dim),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("use_qk_norm", True)
    keys.only("use_cla", False)
    sizes = sizes_from_hf(keys)
    config = ModelConfig(
        family="hunyuan",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": _rope_from_hf(keys, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "config.json")


def _rope_from_hf(keys: Keys, head_dim: int) -> RopeConfig:
    """What is called dynamic has a factor alpha that stretches the base once and for all."""
    rope = one_rope_from_hf(keys, head_dim)
    params = keys.part("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    if not params.has("alpha") or head_dim == 2:  # whose one frequency is 1
        return rope
    params.only("rope_type" if params.has("rope_type") else "type", "dynamic")
    stretch = power(params.number("alpha", smallest=1), head_dim / (head_dim - 2))
    return replace(rope, base=rope.base * stretch)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "hunyuan-dense.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="hunyuan",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="hunyuan",
        models="Hunyuan 0.5B, 1.8B, 4B, 7B; Hunyuan-MT",
        hf_architectures=("HunYuanDenseV1ForCausalLM",),
        gguf_architectures=("hunyuan-dense",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
