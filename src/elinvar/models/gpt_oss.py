"""gpt-oss (OpenAI, 2025): mixtures of experts with biases behind a clamped SwiGLU, every other layer
with a sliding window, and a sink in each head's softmax.

The experts are published as MXFP4, as rows of outputs; exports in bf16 hold them as (in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig, MoEConfig, RopeConfig
from elinvar.models import llama
from elinvar.models.experts import mixture, stacked_rules
from elinvar.models.family import Family
from elinvar.models.glm4_moe import NORMS
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    GGUF,
    HF,
    TO,
    attention_rules,
    bias_rules,
    every_nth_full,
    kinds_from_hf,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

HEAD_DIM, BASE = 64, 150_000.0


def rules(config: ModelConfig) -> list[Rule]:
    assert config.moe is not None
    d, attn = config.dim, HF + "self_attn."
    router = HF + "mlp.router", GGUF + "ffn_gate_inp"
    out = TO + "o_bias", attn + "o_proj.bias", GGUF + "attn_output.bias"
    return [
        *norm_rules(NORMS, d),
        *attention_rules(config),
        *bias_rules(config, optional=True),
        Rule(*out, (d,), optional=True),
        Rule(TO + "sinks", attn + "sinks", GGUF + "attn_sinks.weight", (config.num_heads,)),
        *with_bias(TO + "router", *router, (config.moe.num_experts, d)),
        *stacked_rules(config, in_turns=True, biased=True),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("swiglu_alpha", 1.702)
    keys.only("swiglu_limit", 7.0)
    sizes = sizes_from_hf(keys, HEAD_DIM)
    kinds = kinds_from_hf(keys, every_nth_full(2, sizes["num_layers"]))
    config = _config(
        sizes,
        kinds,
        one_rope_from_hf(keys, sizes["head_dim"], BASE),
        norm_eps=keys.number("rms_norm_eps"),
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        moe=_mixture(keys, "num_local_experts", "num_experts_per_tok", sizes),
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. The files do
    not say that YaRN's blend goes from fraction to fraction of a frequency, as every gpt-oss has it."""
    keys = Keys(metadata, "The GGUF file", "gpt-oss.")
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    sizes["ff_dim"] = keys.size("expert_feed_forward_length", sizes["ff_dim"])
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"], BASE)
    if rope.yarn is not None:
        rope = replace(rope, yarn=replace(rope.yarn, truncate=False))
    config = _config(
        sizes,
        every_nth_full(2, sizes["num_layers"]),
        rope,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        window=keys.size("attention.sliding_window"),
        moe=_mixture(keys, "expert_count", "expert_used_count", sizes),
    )
    return checked(config, "The GGUF file")


def _mixture(keys: Keys, count_key: str, used_key: str, sizes: Mapping[str, Any]) -> MoEConfig:
    """The softmax is over the logits of the chosen alone."""
    layers = range(sizes["num_layers"])
    return mixture(keys, count_key, used_key, sizes["ff_dim"], layers, renormalise=True)


def _config(
    sizes: Mapping[str, Any], kinds: tuple[LayerKind, ...], rope: RopeConfig, **more: Any
) -> ModelConfig:
    return ModelConfig(
        family="gpt_oss",
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, rope),
        activation="swiglu_oai",
        **sizes,
        **more,
    )


FAMILIES = (
    Family(
        name="gpt_oss",
        models="gpt-oss-20b, gpt-oss-120b",
        hf_architectures=("GptOssForCausalLM",),
        gguf_architectures=("gpt-oss",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
