"""Gemma and CodeGemma (Gemma Team, 2024): Llama's blocks with a scaled embedding and GeGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.gemma3 import HEAD_DIM
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    mlp_rules,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.weights.fixes import AddOne
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face files hold the norms' gains without their 1."""
    return [
        *norm_rules(NORMS, config.dim, AddOne()),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config, AddOne()),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported. The
    first files say gelu and mean its approximation by tanh."""
    keys = Keys(metadata, "config.json")
    for key in ("hidden_act", "hidden_activation"):
        keys.only(key, "gelu", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("use_bidirectional_attention", False)
    sizes = sizes_from_hf(keys, HEAD_DIM, tied=True)
    config = ModelConfig(
        family="gemma",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"])},
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "gemma.")
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    config = ModelConfig(
        family="gemma",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="gemma",
        models="Gemma 2B and 7B, CodeGemma",
        hf_architectures=("GemmaForCausalLM",),
        gguf_architectures=("gemma",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
