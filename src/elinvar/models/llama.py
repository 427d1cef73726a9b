"""Llama 2 and 3 (Touvron et al., 2023), and its many relatives with the same blocks: SmolLM2 is one.

Pre-norm with RMSNorm, grouped-query attention with rotary positions, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models.experts import feeds
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.mtp import NEXTN, decoder
from elinvar.models.shared import (
    FULL,
    attention_rules,
    by_layer,
    mlp_rules,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    qkv_bias,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
}


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        attention = Attention(
            config,
            i,
            (w["q"], w["k"], w["v"]),
            w["o"],
            ops,
            q_gain=w.get("q_norm"),
            k_gain=w.get("k_norm"),
            qkv_bias=qkv_bias(w),
            out_bias=w.get("o_bias"),
            sinks=w.get("sinks"),
        )
        mlp = feeds(config, w, ops)
        return Block(norm(w["attn_norm"]), attention, norm(w["mlp_norm"]), mlp)

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return decoder(config, weights, ops, blocks, norm, lambda w: block(config.num_layers - 1, w))


def rules(config: ModelConfig) -> list[Rule]:
    """llama.cpp's converter interleaves the rotary pairs of q and k."""
    q_fix, k_fix = UnpermuteRows(config.num_heads), UnpermuteRows(config.num_kv_heads)
    return [
        *norm_rules(NORMS, config.dim),
        *attention_rules(config, q_fix, k_fix),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    sizes = sizes_from_hf(keys)
    config = ModelConfig(
        family="llama",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys, and from which tensors it holds: no output.weight is a tied head,
    rope_freqs.weight holds divisors of the rotary frequencies (Llama 3.1)."""
    keys = Keys(metadata, "The GGUF file", "llama.")
    keys.only("expert_count", 0)
    sizes = sizes_from_gguf(keys, tensors)
    keys.only("rope.dimension_count", sizes["head_dim"])
    config = ModelConfig(
        family="llama",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="llama",
        models="Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2, Falcon 3, Yi",
        hf_architectures=("LlamaForCausalLM",),
        gguf_architectures=("llama",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
        mtp=NEXTN,
        tested="random weights against transformers, and SmolLM2-135M itself",
    ),
)
