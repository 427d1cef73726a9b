"""Mistral and Ministral (Jiang et al., 2023): Llama's blocks, with a sliding window on all layers, on
some, or on none. Ministral 3 sharpens attention with the position, as Llama 4 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig, TemperatureConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    kinds_from_hf,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.rope import yarn_mscale
from elinvar.weights.tensor import HostTensor


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    kind: LayerKind = "sliding" if keys.has("sliding_window") else "full"
    kinds = kinds_from_hf(keys, (kind,) * sizes["num_layers"])
    rope = one_rope_from_hf(keys, sizes["head_dim"])
    params = keys.part("rope_parameters")
    temperature = None
    if params.has("llama_4_scaling_beta"):
        length = params.size("original_max_position_embeddings")
        temperature = TemperatureConfig(params.number("llama_4_scaling_beta"), length)
    config = ModelConfig(
        family="mistral",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, rope),
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        temperature={} if temperature is None else dict.fromkeys(kinds, temperature),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "mistral3.")
    keys.only("expert_count", 0)
    sizes = sizes_from_gguf(keys, tensors)
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"])
    if rope.yarn is not None:  # the checkpoint's mscale_all_dim, beside an mscale of 1
        all_dim = keys.number("rope.scaling.yarn_log_multiplier", 0.0, smallest=0)
        factor = rope.attention_factor / yarn_mscale(rope.yarn.factor, all_dim)
        rope = replace(rope, attention_factor=factor)
    temperature = {}
    if keys.has("attention.temperature_scale"):
        key = "attention.temperature_length"
        length = keys.size(key if keys.has(key) else "rope.scaling.original_context_length")
        scale = keys.number("attention.temperature_scale")
        temperature = dict.fromkeys(FULL, TemperatureConfig(scale, length))
    config = ModelConfig(
        family="mistral",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": rope},
        temperature=temperature,
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="mistral",
        models="Mistral 7B, Small, Nemo; Ministral 8B; text of Mistral Small 3.1, Ministral 3",
        hf_architectures=(
            "MistralForCausalLM",
            "MinistralForCausalLM",
            "Ministral3ForCausalLM",
            "Mistral3ForConditionalGeneration",
        ),
        gguf_architectures=("mistral3",),  # the others are llama to llama.cpp
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=llama.rules,
        build=llama.build,
    ),
)
