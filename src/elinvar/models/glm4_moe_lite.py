"""GLM-4.7-Flash (Z.ai, 2026): DeepSeek V3's layers at another size; llama.cpp calls it deepseek2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import deepseek
from elinvar.models.family import Family
from elinvar.models.keys import Keys


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    values = {"topk_method": "noaux_tc", "first_k_dense_replace": 1, **metadata}
    types = keys.raw("mlp_layer_types")
    if types is not None:
        dense = types.count("dense") if isinstance(types, list) else 0
        if types != ["dense"] * dense + ["sparse"] * (keys.size("num_hidden_layers") - dense):
            raise keys.bad("mlp_layer_types", "dense for the first layers, sparse for the others")
        values["first_k_dense_replace"] = dense
    return replace(deepseek.config_from_hf(values), family="glm4_moe_lite")


FAMILIES = (
    Family(
        name="glm4_moe_lite",
        models="GLM-4.7-Flash",
        hf_architectures=("Glm4MoeLiteForCausalLM",),
        gguf_architectures=(),  # llama.cpp calls it deepseek2
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=deepseek.rules,
        build=deepseek.build,
    ),
)
