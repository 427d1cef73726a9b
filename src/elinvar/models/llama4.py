"""Llama 4 (Meta, 2025), text only: three layers with rotary positions, attention within chunks and
normed heads to one without any of them, which sharpens with its position; mixtures of experts that see
their input times a sigmoid, beside one that sees all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from elinvar.base.config import LayerKind, ModelConfig, MoEConfig, RopeConfig, TemperatureConfig
from elinvar.models.experts import MAX_EXPERTS, PARTS, dense_rules, feeds, shapes, stacked_rules
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.shared import (
    GGUF,
    HF,
    TO,
    attention_rules,
    by_layer,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
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

CHUNK, PERIOD, BASE = 8192, 4, 500_000.0
SCALE, LENGTH = 0.1, 8192
"""Of the temperature; it counts positions from 1."""


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    ones = np.ones(config.head_dim, np.float32)

    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        # transformers norms what is rotated, here it is turned round: without gains both commute.
        gain = ones if config.unit_heads and config.layer_kinds[i] == "chunked" else None
        attention = Attention(config, i, (w["q"], w["k"], w["v"]), w["o"], ops, gain, gain)
        return Block(norm(w["attn_norm"]), attention, norm(w["mlp_norm"]), feeds(config, w, ops))

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Decoder(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    """Rotary pairs are interleaved in checkpoints and in GGUF files alike."""
    assert config.moe is not None
    d, c, ff = config.dim, config.moe, HF + "feed_forward."
    turns = UnpermuteRows(config.num_heads), UnpermuteRows(config.num_kv_heads)
    router = TO + "router", ff + "router.weight", GGUF + "ffn_gate_inp.weight"
    shared = [
        Rule(
            f"{TO}shared.{part}",
            f"{ff}shared_expert.{part}_proj.weight",
            f"{GGUF}ffn_{part}_shexp.weight",
            shape,
        )
        for part, shape in zip(PARTS, shapes(d, c.shared_ff_dim), strict=True)
    ]
    mixed = [Rule(*router, (c.num_experts, d)), *shared]
    return [
        *norm_rules(NORMS, d),
        *(replace(rule, hf_fix=rule.gguf_fix) for rule in attention_rules(config, *turns)),
        *dense_rules(config, "feed_forward"),
        *(replace(rule, layers=c.layers) for rule in mixed),
        *stacked_rules(config, "feed_forward"),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    sizes = sizes_from_hf(keys)
    num_layers, ff_dim = sizes["num_layers"], sizes["ff_dim"]
    sizes["ff_dim"] = keys.size("intermediate_size_mlp")
    num_experts = keys.size("num_local_experts", largest=MAX_EXPERTS)
    top_k = keys.size("num_experts_per_tok", largest=num_experts)
    step = keys.size("interleave_moe_layer_step", 1)
    mixed = keys.raw("moe_layers")
    if mixed is None:
        mixed = list(range(step - 1, num_layers, step))
    if not isinstance(mixed, list) or not all(i in range(num_layers) for i in mixed):
        raise keys.bad("moe_layers", f"a list of numbers below {num_layers}")
    rope = one_rope_from_hf(keys, sizes["head_dim"], BASE)
    if rope.attention_factor != 1:  # it would not commute with the norms of heads
        raise keys.bad("rope_parameters", "of type default, linear or llama3")
    temperature = None
    # Some files have a number where others have true.
    if keys.raw("attn_temperature_tuning") not in (False, 0):
        scale = keys.number("attn_scale", SCALE)
        temperature = TemperatureConfig(scale, keys.size("floor_scale", LENGTH), offset=1)
    config = _config(
        sizes,
        _kinds_from_hf(keys, num_layers),
        rope,
        _mixture(num_experts, top_k, ff_dim, mixed),
        temperature,
        norm_eps=keys.number("rms_norm_eps"),
        attn_chunk=keys.size("attention_chunk_size", CHUNK),
        unit_heads=keys.flag("use_qk_norm", True),
    )
    return checked(config, "config.json")


def _kinds_from_hf(keys: Keys, num_layers: int) -> tuple[LayerKind, ...]:
    """no_rope_layers has a 1 for each layer *with* rotary positions."""
    period = keys.size("no_rope_layer_interval", PERIOD)
    rotated = keys.raw("no_rope_layers") or [(i + 1) % period != 0 for i in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) < num_layers:
        raise keys.bad("no_rope_layers", f"a list of {num_layers} times 0 or 1")
    kinds: list[LayerKind] = ["chunked" if one else "full" for one in rotated[:num_layers]]
    types = keys.raw("layer_types")
    if types is not None and types != [f"{kind}_attention" for kind in kinds]:
        raise keys.bad("layer_types", "chunked_attention where no_rope_layers has 1, or not given")
    return tuple(kinds)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. The files do
    not say chunk, period and temperature, nor that of the models that exist all but those with 128
    experts norm their heads."""
    keys = Keys(metadata, "The GGUF file", "llama4.")
    sizes = sizes_from_gguf(keys, tensors)
    num_layers = sizes["num_layers"]
    keys.only("rope.dimension_count", sizes["head_dim"])
    num_experts = keys.size("expert_count", largest=MAX_EXPERTS)
    top_k = keys.size("expert_used_count", largest=num_experts)
    step = keys.size("interleave_moe_layer_step")
    mixed = range(step - 1, num_layers, step)
    config = _config(
        sizes,
        tuple("chunked" if (i + 1) % PERIOD else "full" for i in range(num_layers)),
        one_rope_from_gguf(keys, tensors, sizes["head_dim"], BASE),
        _mixture(num_experts, top_k, keys.size("expert_feed_forward_length"), mixed),
        TemperatureConfig(SCALE, LENGTH, offset=1),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        attn_chunk=CHUNK,
        unit_heads=num_experts != 128,
    )
    return checked(config, "The GGUF file")


def _mixture(num_experts: int, top_k: int, ff_dim: int, layers: Sequence[int]) -> MoEConfig:
    return MoEConfig(
        num_experts,
        top_k,
        ff_dim,
        tuple(layers),
        scoring="sigmoid",
        shared_ff_dim=ff_dim,
        scale_inputs=True,
    )


def _config(
    sizes: Mapping[str, Any],
    kinds: tuple[LayerKind, ...],
    rope: RopeConfig,
    moe: MoEConfig,
    temperature: TemperatureConfig | None,
    **more: Any,
) -> ModelConfig:
    return ModelConfig(
        family="llama4",
        layer_kinds=kinds,
        rope={"chunked": rope, "full": RopeConfig(rope.base, 0)},
        moe=moe,
        temperature={} if temperature is None else {"full": temperature},
        **sizes,
        **more,
    )


FAMILIES = (
    Family(
        name="llama4",
        models="Llama 4 Scout, Maverick, text",
        hf_architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        gguf_architectures=("llama4",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
