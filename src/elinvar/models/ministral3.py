"""Ministral 3 (Mistral AI, 2025): Mistral whose queries grow with their positions beyond the original
context; and the text of Mistral Small 3.1 and 3.2, which is wrapped alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig, TemperatureConfig
from elinvar.models import llama, mistral
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import FULL, one_rope_from_gguf, sizes_from_gguf
from elinvar.nn.rope import MAX_POSITIONS, yarn_mscale
from elinvar.weights.tensor import HostTensor


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    config = replace(mistral.config_from_hf(metadata), family="ministral3")
    keys = Keys(metadata, "config.json")
    scaling = keys.part("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    beta = scaling.number("llama_4_scaling_beta", 0.0, smallest=0)
    return _sharpened(config, beta, scaling, "original_max_position_embeddings")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "mistral3.")
    keys.only("expert_count", 0)
    keys.only("attention.sliding_window", 0)
    sizes = sizes_from_gguf(keys, tensors)
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"])
    if rope.yarn is not None:  # the checkpoint's mscale_all_dim, beside an mscale of 1
        all_dim = keys.number("rope.scaling.yarn_log_multiplier", 0.0, smallest=0)
        factor = rope.attention_factor / yarn_mscale(rope.yarn.factor, all_dim)
        rope = replace(rope, attention_factor=factor)
    config = ModelConfig(
        family="ministral3",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": rope},
        **sizes,
    )
    beta = keys.number("attention.temperature_scale", 0.0, smallest=0)
    length = "attention.temperature_length"
    context = length if keys.has(length) else "rope.scaling.original_context_length"
    config = _sharpened(config, beta, keys, context)
    return checked(config, "The GGUF file")


def _sharpened(config: ModelConfig, beta: float, keys: Keys, context_key: str) -> ModelConfig:
    if not beta:
        return config
    temperature = TemperatureConfig(beta, keys.size(context_key, largest=MAX_POSITIONS))
    return replace(config, temperature=dict.fromkeys(config.layer_kinds, temperature))


FAMILIES = (
    Family(
        name="ministral3",
        models="Ministral 3; Mistral Small 3.1 and 3.2, text",
        hf_architectures=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
        gguf_architectures=("mistral3",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=llama.rules,
        build=llama.build,
    ),
)
