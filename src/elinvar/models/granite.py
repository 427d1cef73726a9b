"""Granite 3 (IBM, 2024): Llama's blocks with four constant factors, on the embedding, on q k, on what
a layer adds to the stream, and on the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama
from elinvar.models.experts import feeds
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    by_layer,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.norm import RMSNorm, Scale
from elinvar.ops.api import F32, Ops
from elinvar.weights.tensor import HostTensor


class Granite(Decoder):
    def logits(self, h_LD: F32) -> F32:
        return self.ops.scale(super().logits(h_LD), self.config.logit_scale)


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    scale = Scale(config.residual_scale, ops)

    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        attention = Attention(config, i, (w["q"], w["k"], w["v"]), w["o"], ops)
        norms = norm(w["attn_norm"]), norm(w["mlp_norm"])
        return Block(norms[0], attention, norms[1], feeds(config, w, ops), scale, scale)

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Granite(config, weights, ops, blocks, norm(weights["norm"]))


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    sizes = sizes_from_hf(keys)
    sizes["attn_scale"] = keys.number("attention_multiplier", 1.0)
    config = ModelConfig(
        family="granite",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"])},
        embed_scale=keys.number("embedding_multiplier", 1.0),
        residual_scale=keys.number("residual_multiplier", 1.0),
        logit_scale=1 / keys.number("logits_scaling", 1.0),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor], prefix: str = "granite."
) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. prefix: of the
    keys."""
    keys = Keys(metadata, "The GGUF file", prefix)
    keys.only("rope.scaling.finetuned", True)
    sizes = sizes_from_gguf(keys, tensors)
    sizes["attn_scale"] = keys.number("attention.scale", sizes["attn_scale"])
    config = ModelConfig(
        family="granite",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        embed_scale=keys.number("embedding_scale", 1.0),
        residual_scale=keys.number("residual_scale", 1.0),
        logit_scale=1 / keys.number("logit_scale", 1.0),
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="granite",
        models="Granite 3 (dense)",
        hf_architectures=("GraniteForCausalLM",),
        gguf_architectures=("granite",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=llama.rules,
        build=build,
    ),
)
