"""Qwen 2 and 2.5 (Qwen Team, 2024): Llama's blocks with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.qwen3 import window_kinds
from elinvar.models.shared import (
    FULL,
    attention_rules,
    bias_rules,
    mlp_rules,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(NORMS, config.dim),
        *attention_rules(config),
        *bias_rules(config),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    kinds = window_kinds(keys, sizes["num_layers"])
    config = ModelConfig(
        family="qwen2",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, one_rope_from_hf(keys, sizes["head_dim"])),
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "qwen2.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="qwen2",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"], base=1_000_000.0)},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="qwen2",
        models="Qwen2, Qwen2.5 (dense)",
        hf_architectures=("Qwen2ForCausalLM",),
        gguf_architectures=("qwen2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
