"""Seed-OSS (ByteDance Seed, 2025): Llama's blocks with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.glm4_moe import NORMS
from elinvar.models.keys import Keys, checked
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

HEAD_DIM = 128


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(NORMS, config.dim),
        *attention_rules(config),
        *bias_rules(config, optional=True),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_out_bias", False)
    keys.only("mlp_bias", False)
    sizes = sizes_from_hf(keys, HEAD_DIM)
    config = ModelConfig(
        family="seed_oss",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "seed_oss.")
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    config = ModelConfig(
        family="seed_oss",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="seed_oss",
        models="Seed-OSS-36B",
        hf_architectures=("SeedOssForCausalLM",),
        gguf_architectures=("seed_oss",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
