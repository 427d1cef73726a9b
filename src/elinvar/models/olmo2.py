"""OLMo 2 and 3 (OLMo Team, 2024 and 2025): norms behind attention and MLP and none before them, and one
over all heads of q and one over all of k; OLMo 3 has sliding windows on three layers of four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig, RopeConfig
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    by_layer,
    every_nth_full,
    kinds_from_gguf,
    kinds_from_hf,
    mlp_rules,
    norm_rules,
    one_rope_from_gguf,
    outer_rules,
    ropes_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import NoNorm, RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

PATTERN = 4
"""Every fourth layer is full."""
BASE = 500_000.0
POST_NORMS = {
    "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    none = NoNorm(ops)

    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        qkv = (w["q"], w["k"], w["v"])
        attention = Attention(config, i, qkv, w["o"], ops, w["q_norm"], w["k_norm"])
        mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
        posts = norm(w["attn_post_norm"]), norm(w["mlp_post_norm"])
        return Block(none, attention, none, mlp, *posts)

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Decoder(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(POST_NORMS, config.dim),
        *whole_norm_rules(config),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def whole_norm_rules(config: ModelConfig) -> list[Rule]:
    """Gains of the norms over all heads."""
    heads = {"q_norm": config.num_heads, "k_norm": config.num_kv_heads}
    pairs = (norm_rules({n: HEAD_NORMS[n]}, heads[n] * config.head_dim) for n in heads)
    return [rule for [rule] in pairs]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    sizes = sizes_from_hf(keys)
    kinds = FULL * sizes["num_layers"]
    if keys.has("sliding_window"):
        kinds = kinds_from_hf(keys, every_nth_full(PATTERN, sizes["num_layers"]))
    ropes = ropes_from_hf(keys, sizes["head_dim"], BASE)
    config = ModelConfig(
        family="olmo2",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope={kind: ropes[kind] for kind in kinds},
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors. Rotary scaling is of full layers only."""
    keys = Keys(metadata, "The GGUF file", "olmo2.")
    sizes = sizes_from_gguf(keys, tensors)
    kinds = FULL * sizes["num_layers"]
    if keys.has("attention.sliding_window"):
        kinds = kinds_from_gguf(keys, sizes["num_layers"], PATTERN)
    full = one_rope_from_gguf(keys, tensors, sizes["head_dim"], BASE)
    ropes = {"full": full, "sliding": RopeConfig(full.base, full.dim)}
    config = ModelConfig(
        family="olmo2",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=kinds,
        rope={kind: ropes[kind] for kind in kinds},
        window=keys.size("attention.sliding_window") if "sliding" in kinds else None,
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="olmo2",
        models="OLMo 2, OLMo 3",
        hf_architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        gguf_architectures=("olmo2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
