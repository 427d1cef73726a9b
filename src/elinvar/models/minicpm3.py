"""MiniCPM3 (Hu et al., 2024): MiniCPM's factors around DeepSeek's latent attention, whose rotated dims lie
in halves here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import deepseek
from elinvar.models.deepseek import ATTENTION
from elinvar.models.family import Family
from elinvar.models.granite import Granite
from elinvar.models.keys import Keys
from elinvar.models.minicpm import scales_from_hf
from elinvar.models.shared import by_layer
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mla import LatentAttention, LatentWeights
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import RMSNorm, Scale
from elinvar.ops.api import Ops
from elinvar.weights.rules import Rule, UnpermuteRows


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    scale = Scale(config.residual_scale, ops)

    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(w: dict[str, Any]) -> Block:
        latent = LatentWeights(**{name: w[name] for name in ATTENTION if name in w})
        mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
        norms = norm(w["attn_norm"]), norm(w["mlp_norm"])
        return Block(norms[0], LatentAttention(config, latent, ops), norms[1], mlp, scale, scale)

    blocks = [block(w) for w in by_layer(weights, config.num_layers)]
    return Granite(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    return [
        replace(rule, hf_fix=None) if isinstance(rule.hf_fix, UnpermuteRows) else rule
        for rule in deepseek.rules(config)
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("mlp_bias", False)
    value_dim = keys.size("hidden_size") // keys.size("num_attention_heads")
    defaults = {"v_head_dim": keys.size("v_head_dim", value_dim), "tie_word_embeddings": True}
    dense = {"first_k_dense_replace": keys.size("num_hidden_layers")}
    config = deepseek.config_from_hf({**defaults, **metadata, **dense})
    return replace(config, family="minicpm3", **scales_from_hf(keys, config.num_layers, config.dim))


FAMILIES = (
    Family(
        name="minicpm3",
        models="MiniCPM3-4B",
        hf_architectures=("MiniCPM3ForCausalLM",),
        gguf_architectures=(),
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
    ),
)
