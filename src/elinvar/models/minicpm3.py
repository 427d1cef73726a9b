"""MiniCPM3 (Hu et al., 2024): MiniCPM's factors around DeepSeek's latent attention, whose rotated dims lie
in halves here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import LatentConfig, ModelConfig
from elinvar.models import deepseek
from elinvar.models.deepseek import ATTENTION, whole_panels
from elinvar.models.family import Family
from elinvar.models.granite import Granite
from elinvar.models.keys import Keys, checked
from elinvar.models.minicpm import first_scales, scales_from_hf
from elinvar.models.shared import FULL, by_layer, one_rope_from_gguf, sizes_from_gguf
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mla import LatentAttention, LatentWeights
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import RMSNorm, Scale
from elinvar.ops.api import Ops
from elinvar.ops.layout import PANEL
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


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
        replace(rule, hf_fix=None, gguf_fix=None)
        if isinstance(rule.hf_fix, UnpermuteRows)
        else rule
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


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors. The files say neither the factors nor how large a value
    is."""
    keys = Keys(metadata, "The GGUF file", "minicpm3.")
    sizes = sizes_from_gguf(keys, tensors)
    rope_dim, head_dim = keys.size("rope.dimension_count"), sizes["head_dim"]
    if rope_dim >= head_dim:
        raise keys.bad("rope.dimension_count", f"below the {head_dim} dims of a head")
    value_dim = sizes["dim"] // sizes["num_heads"]
    if value_dim % PANEL:
        raise keys.bad("embedding_length", f"a multiple of {PANEL} for each head")
    latent = LatentConfig(
        rank=whole_panels(keys, "attention.kv_lora_rank"),
        nope_dim=head_dim - rope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        q_rank=keys.size("attention.q_lora_rank"),
    )
    sizes |= {"num_kv_heads": 1, "head_dim": latent.rank + rope_dim}
    config = ModelConfig(
        family="minicpm3",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, rope_dim)},
        latent=latent,
        **first_scales(sizes["num_layers"], sizes["dim"]),
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="minicpm3",
        models="MiniCPM3-4B",
        hf_architectures=("MiniCPM3ForCausalLM",),
        gguf_architectures=("minicpm3",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
