"""StableLM 2 and 3B (Stability AI, 2023 and 2024): Llama's blocks behind layer norms, rotary positions on
a quarter of each head, perhaps biases on q, k and v, perhaps attention and MLP side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    GGUF,
    HF,
    TO,
    attention_rules,
    bias_rules,
    by_layer,
    mlp_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    qkv_bias,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder, Layer, ParallelBlock
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import LayerNorm
from elinvar.ops.api import Ops
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(w: Mapping[str, Any], name: str) -> LayerNorm:
        return LayerNorm(w[name], w.get(f"{name}_bias"), config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Layer:
        qkv = w["q"], w["k"], w["v"]
        attention = Attention(config, i, qkv, w["o"], ops, qkv_bias=qkv_bias(w))
        mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
        if config.parallel:
            return ParallelBlock(norm(w, "attn_norm"), attention, None, mlp, ops)
        return Block(norm(w, "attn_norm"), attention, norm(w, "mlp_norm"), mlp)

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Decoder(config, weights, ops, blocks, norm(weights, "norm"))


def rules(config: ModelConfig) -> list[Rule]:
    d = (config.dim,)
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if config.parallel:
        del norms["ffn_norm"]
    return [
        *(
            rule
            for gguf, hf in norms.items()
            for rule in with_bias(TO + gguf.replace("ffn", "mlp"), HF + hf, GGUF + gguf, d)
        ),
        *attention_rules(config),
        *bias_rules(config, optional=True),
        *mlp_rules(config),
        *outer_rules(config),
        Rule("norm_bias", "model.norm.bias", "output_norm.bias", d, optional=True),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("qk_layernorm", False)
    sizes = sizes_from_hf(keys)
    config = ModelConfig(
        family="stablelm",
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], partial=0.25)},
        parallel=keys.flag("use_parallel_residual", False),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. What the key of
    parallel residuals says is wrong in old files: a second norm tells."""
    keys = Keys(metadata, "The GGUF file", "stablelm.")
    sizes = sizes_from_gguf(keys, tensors)
    if "blk.0.attn_q_norm.weight" in tensors:
        raise ModelError(
            "The GGUF file norms heads of q and k (blk.0.attn_q_norm.weight), which is "
            "not supported of StableLM; use another model."
        )
    config = ModelConfig(
        family="stablelm",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        parallel="blk.0.ffn_norm.weight" not in tensors,
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="stablelm",
        models="StableLM 2 1.6B, StableLM 3B, Zephyr 3B",
        hf_architectures=("StableLmForCausalLM",),
        gguf_architectures=("stablelm",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
