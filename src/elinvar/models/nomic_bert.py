"""Nomic BERT (Nussbaum et al., 2024): BERT with rotary positions, a gated MLP and no biases but the norms'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import EncoderConfig, ModelConfig
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    GGUF,
    TO,
    by_layer,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.nn.attention import Attention
from elinvar.nn.encoder import Encoder, EncoderLayer
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import LayerNorm
from elinvar.ops.api import Ops
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

_AS_PUBLISHED = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_emb_fraction": "partial_rotary_factor",
}
"""Names in the first config.json files, and in those of transformers."""


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Encoder:
    def norm(w: Mapping[str, Any], name: str) -> LayerNorm:
        return LayerNorm(w[name], w.get(f"{name}_bias"), config.norm_eps, ops)

    def layer(i: int, w: dict[str, Any]) -> EncoderLayer:
        attention = Attention(config, i, (w["q"], w["k"], w["v"]), w["o"], ops)
        mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
        return EncoderLayer(attention, norm(w, "attn_norm"), mlp, norm(w, "mlp_norm"))

    layers = [layer(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Encoder(config, weights, ops, layers, norm(weights, "embed_norm"))


def rules(config: ModelConfig) -> list[Rule]:
    assert config.encoder is not None
    d, f, v = config.dim, config.ff_dim, config.vocab_size
    hf, types = "encoder.layers.{i}.", config.encoder.num_types
    qkv = hf + "attn.Wqkv.weight", GGUF + "attn_qkv.weight"
    parts = [Part((3 * d, d), at * d) for at in range(3)]
    return [
        *(
            Rule(TO + name, *qkv, (d, d), hf_part=part, gguf_part=part)
            for name, part in zip("qkv", parts, strict=True)
        ),
        Rule(TO + "o", hf + "attn.out_proj.weight", GGUF + "attn_output.weight", (d, d)),
        *with_bias(TO + "attn_norm", hf + "norm1", GGUF + "attn_output_norm", (d,)),
        Rule(TO + "up", hf + "mlp.fc11.weight", GGUF + "ffn_up.weight", (f, d)),
        Rule(TO + "gate", hf + "mlp.fc12.weight", GGUF + "ffn_gate.weight", (f, d)),
        Rule(TO + "down", hf + "mlp.fc2.weight", GGUF + "ffn_down.weight", (d, f)),
        *with_bias(TO + "mlp_norm", hf + "norm2", GGUF + "layer_output_norm", (d,)),
        Rule("embed", "embeddings.word_embeddings.weight", "token_embd.weight", (v, d)),
        Rule("types", "embeddings.token_type_embeddings.weight", "token_types.weight", (types, d)),
        *with_bias("embed_norm", "emb_ln", "token_embd_norm", (d,)),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys({_AS_PUBLISHED.get(k, k): v for k, v in metadata.items()}, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("activation_function", "swiglu")
    keys.only("rotary_emb_interleaved", False)
    for part in ("prenorm", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "use_rms_norm"):
        keys.only(part, False)
    sizes = sizes_from_hf(keys)
    # Longer texts would need frequencies that depend on the length of each.
    longest = keys.size("max_trained_positions", sizes["max_context"])
    sizes["max_context"] = min(sizes["max_context"], longest)
    config = ModelConfig(
        family="nomic_bert",
        norm_eps=keys.number("layer_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], base=1000.0)},
        encoder=EncoderConfig(num_types=keys.size("type_vocab_size", 2)),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors."""
    keys = Keys(metadata, "The GGUF file", "nomic-bert.")
    keys.only("attention.causal", False)
    sizes = sizes_from_gguf(keys, tensors)
    types = tensors.get("token_types.weight")
    config = ModelConfig(
        family="nomic_bert",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"], base=1000.0)},
        encoder=EncoderConfig(num_types=2 if types is None else len(types.data)),
        **sizes,
    )
    return checked(config, "The GGUF file")


ENCODERS = (
    Family(
        name="nomic_bert",
        models="Nomic Embed Text v1, v1.5",
        hf_architectures=("NomicBertModel",),
        gguf_architectures=("nomic-bert",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
