"""GPT-NeoX (Black et al., 2022) and Pythia: layer norms, biases everywhere, rotary positions on a part
of each head, an MLP without a gate beside the attention instead of after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    GGUF,
    TO,
    activation_from_hf,
    by_layer,
    one_rope_from_gguf,
    one_rope_from_hf,
    qkv_bias,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder, Layer, ParallelBlock
from elinvar.nn.mlp import MLP
from elinvar.nn.norm import LayerNorm
from elinvar.ops.api import Ops
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor


def build(
    config: ModelConfig, weights: Mapping[str, Any], ops: Ops, frame: type[Decoder] = Decoder
) -> Decoder:
    """Of this family and its relatives: layers with an mlp_norm or without, with biases or without."""

    def norm(w: Mapping[str, Any], name: str) -> LayerNorm:
        return LayerNorm(w[name], w.get(f"{name}_bias"), config.norm_eps, ops)

    def layer(i: int, w: dict[str, Any]) -> Layer:
        qkv = (w["q"], w["k"], w["v"])
        attention = Attention(
            config, i, qkv, w["o"], ops, qkv_bias=qkv_bias(w), out_bias=w.get("o_bias")
        )
        biases = w.get("up_bias"), w.get("down_bias")
        mlp = MLP(w["up"], w["down"], config.activation, ops, *biases)
        first, second = norm(w, "attn_norm"), norm(w, "mlp_norm") if "mlp_norm" in w else None
        if config.parallel or second is None:
            return ParallelBlock(first, attention, second, mlp, ops)
        return Block(first, attention, second, mlp)

    layers = [layer(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return frame(config, weights, ops, layers, norm(weights, "norm"))


def rules(config: ModelConfig) -> list[Rule]:
    """q, k and v of a head lie together in checkpoints; llama.cpp's converter sorts them."""
    d, f, v, h = config.dim, config.ff_dim, config.vocab_size, config.head_dim
    hf = "gpt_neox.layers.{i}."
    qkv = hf + "attention.query_key_value", GGUF + "attn_qkv"
    return [
        *with_bias(TO + "attn_norm", hf + "input_layernorm", GGUF + "attn_norm", (d,)),
        *(
            rule
            for at, name in enumerate("qkv")
            for rule in with_bias(
                TO + name,
                *qkv,
                (d, d),
                hf_part=Part((3 * d,), at * h, h, 3 * h),
                gguf_part=Part((3 * d,), at * d),
            )
        ),
        *with_bias(TO + "o", hf + "attention.dense", GGUF + "attn_output", (d, d)),
        *with_bias(TO + "mlp_norm", hf + "post_attention_layernorm", GGUF + "ffn_norm", (d,)),
        *with_bias(TO + "up", hf + "mlp.dense_h_to_4h", GGUF + "ffn_up", (f, d)),
        *with_bias(TO + "down", hf + "mlp.dense_4h_to_h", GGUF + "ffn_down", (d, f)),
        *with_bias("norm", "gpt_neox.final_layer_norm", "output_norm", (d,)),
        Rule("embed", "gpt_neox.embed_in.weight", "token_embd.weight", (v, d)),
        Rule("head", "embed_out.weight", "output.weight", (v, d)),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("tie_word_embeddings", False)
    sizes = sizes_from_hf(keys)
    sizes["num_kv_heads"] = sizes["num_heads"]
    base, part = keys.number("rotary_emb_base", 10_000.0), keys.number("rotary_pct", 0.25)
    config = ModelConfig(
        family="gpt_neox",
        norm_eps=keys.number("layer_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], base, part)},
        activation=activation_from_hf(keys, "hidden_act", "gelu"),
        parallel=keys.flag("use_parallel_residual", True),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys."""
    keys = Keys(metadata, "The GGUF file", "gptneox.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="gpt_neox",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        activation="gelu",
        parallel=keys.flag("use_parallel_residual", True),
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="gpt_neox",
        models="GPT-NeoX, Pythia",
        hf_architectures=("GPTNeoXForCausalLM",),
        gguf_architectures=("gptneox",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
