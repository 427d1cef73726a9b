"""Mistral and Ministral (Jiang et al., 2023): Llama's blocks, with a sliding window on all layers, on
some, or on none. Ministral 3 sharpens attention with the position, as Llama 4 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig, TemperatureConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import kinds_from_hf, one_rope_from_hf, sizes_from_hf


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
        gguf_architectures=(),  # llama.cpp calls them llama
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=llama.rules,
        build=llama.build,
    ),
)
