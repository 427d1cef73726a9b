"""Gemma 3, text only (Gemma Team, 2025).

Five sliding-window layers to a full one, each kind with its own rotary base; RMS norms before
and after attention and MLP, and on every head of q and k; GeGLU; a tied head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig, RopeConfig
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked, rope_factor_from_gguf
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.shared import (
    attention_rules,
    by_layer,
    every_nth_full,
    kinds_from_hf,
    mlp_rules,
    norm_rules,
    outer_rules,
    ropes_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.fixes import AddOne
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

SLIDING_BASE, FULL_BASE = 10_000.0, 1_000_000.0
PATTERN = 6
"""Every sixth layer is full."""
HEAD_DIM = 256
SEES = "Gemma3ForConditionalGeneration"
LEFT_OUT = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
}
"""By the published files of models that see, where this is so."""
NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        qkv = (w["q"], w["k"], w["v"])
        return Block(
            norm(w["attn_norm"]),
            Attention(config, i, qkv, w["o"], ops, w.get("q_norm"), w.get("k_norm")),
            norm(w["mlp_norm"]),
            GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops),
            attn_post=norm(w["attn_post_norm"]),
            mlp_post=norm(w["mlp_post_norm"]),
        )

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Decoder(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face files hold the norms' gains without their 1."""
    return [
        *norm_rules(NORMS, config.dim, AddOne()),
        *norm_rules(HEAD_NORMS, config.head_dim, AddOne()),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config, AddOne()),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    sees = metadata.get("architectures") == [SEES]
    keys = Keys({**LEFT_OUT, **metadata} if sees else metadata, "config.json")
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("use_bidirectional_attention", False)
    keys.only("final_logit_softcapping")
    keys.only("attn_logit_softcapping")
    sizes = sizes_from_hf(keys, HEAD_DIM, tied=True)
    pattern = keys.size("sliding_window_pattern", PATTERN)
    sliding_base = keys.number("rope_local_base_freq", SLIDING_BASE, smallest=1)
    sizes["attn_scale"] = keys.number("query_pre_attn_scalar", 256) ** -0.5
    config = ModelConfig(
        family="gemma3",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds_from_hf(keys, every_nth_full(pattern, sizes["num_layers"])),
        rope=ropes_from_hf(keys, sizes["head_dim"], FULL_BASE, sliding_base),
        window=keys.size("sliding_window"),
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "gemma3.")
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    num_layers, head_dim = sizes["num_layers"], sizes["head_dim"]
    if num_layers == 62:
        # The files do not say query_pre_attn_scalar. It is the head dim but for the 27B model.
        sizes["attn_scale"] = (sizes["dim"] / sizes["num_heads"]) ** -0.5
    full_base = keys.number("rope.freq_base", FULL_BASE, smallest=1)
    sliding_base = keys.number("rope.freq_base_swa", SLIDING_BASE, smallest=1)
    pattern = keys.size("attention.sliding_window_pattern", PATTERN)
    config = ModelConfig(
        family="gemma3",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=every_nth_full(pattern, num_layers),
        rope={
            "full": RopeConfig(full_base, head_dim, factor=rope_factor_from_gguf(keys)),
            "sliding": RopeConfig(sliding_base, head_dim),
        },
        window=keys.size("attention.sliding_window"),
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="gemma3",
        models="Gemma 3, text",
        hf_architectures=("Gemma3ForCausalLM", SEES),
        gguf_architectures=("gemma3",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
        tested="random weights against transformers, and Gemma 3 270M itself",
    ),
)
