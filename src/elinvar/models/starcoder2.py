"""StarCoder 2 (Lozhkov et al., 2024): grouped-query attention with rotary positions and perhaps a
sliding window, layer norms, an MLP without a gate, biases everywhere or nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig
from elinvar.models import gpt_neox
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    GGUF,
    HF,
    TO,
    activation_from_hf,
    attention_rules,
    bias_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    d, f = config.dim, config.ff_dim
    o_bias = HF + "self_attn.o_proj.bias", GGUF + "attn_output.bias"
    return [
        *with_bias(TO + "attn_norm", HF + "input_layernorm", GGUF + "attn_norm", (d,)),
        *attention_rules(config),
        *bias_rules(config, optional=True),
        Rule(TO + "o_bias", *o_bias, (d,), optional=True),
        *with_bias(TO + "mlp_norm", HF + "post_attention_layernorm", GGUF + "ffn_norm", (d,)),
        *with_bias(TO + "up", HF + "mlp.c_fc", GGUF + "ffn_up", (f, d)),
        *with_bias(TO + "down", HF + "mlp.c_proj", GGUF + "ffn_down", (d, f)),
        Rule("norm_bias", "model.norm.bias", "output_norm.bias", (d,)),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    sizes = sizes_from_hf(keys, tied=True)
    kind: LayerKind = "sliding" if keys.has("sliding_window") else "full"
    config = ModelConfig(
        family="starcoder2",
        norm_eps=keys.number("norm_epsilon", 1e-5),
        layer_kinds=(kind,) * sizes["num_layers"],
        rope={kind: one_rope_from_hf(keys, sizes["head_dim"])},
        window=keys.size("sliding_window") if kind == "sliding" else None,
        activation=activation_from_hf(keys, "hidden_act", "gelu_pytorch_tanh"),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. The files do
    not tell of a sliding window."""
    keys = Keys(metadata, "The GGUF file", "starcoder2.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="starcoder2",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="starcoder2",
        models="StarCoder2",
        hf_architectures=("Starcoder2ForCausalLM",),
        gguf_architectures=("starcoder2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=gpt_neox.build,
    ),
)
