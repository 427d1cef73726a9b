"""Gemma 2 (Gemma Team, 2024): Gemma 3's blocks without norms on heads, with soft-capped scores and
logits, and a sliding window on every other layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import gemma3
from elinvar.models.family import Family
from elinvar.models.gemma3 import HEAD_DIM, NORMS
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    attention_rules,
    every_nth_full,
    kinds_from_hf,
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

WINDOW = 4096
ATTN_SOFTCAP, FINAL_SOFTCAP = 50.0, 30.0


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face files hold the norms' gains without their 1."""
    return [
        *norm_rules(NORMS, config.dim, AddOne()),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config, AddOne()),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("use_bidirectional_attention", False)
    sizes = sizes_from_hf(keys, HEAD_DIM, tied=True)
    sizes["attn_scale"] = keys.number("query_pre_attn_scalar", 256) ** -0.5
    kinds = kinds_from_hf(keys, every_nth_full(2, sizes["num_layers"]))

    def softcap(key: str, default: float) -> float | None:
        """A null turns it off; only a key that is not there has the default."""
        return None if key in metadata and not keys.has(key) else keys.number(key, default)

    config = ModelConfig(
        family="gemma2",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, one_rope_from_hf(keys, sizes["head_dim"])),
        window=keys.size("sliding_window", WINDOW),
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        attn_softcap=softcap("attn_logit_softcapping", ATTN_SOFTCAP),
        final_softcap=softcap("final_logit_softcapping", FINAL_SOFTCAP),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "gemma2.")
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    if sizes["num_layers"] == 46:
        # The files do not say query_pre_attn_scalar. It is the head dim but for the 27B model.
        sizes["attn_scale"] = (sizes["dim"] / sizes["num_heads"]) ** -0.5
    kinds = every_nth_full(2, sizes["num_layers"])
    config = ModelConfig(
        family="gemma2",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, one_rope_from_gguf(keys, tensors, sizes["head_dim"])),
        window=keys.size("attention.sliding_window", WINDOW),
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        attn_softcap=keys.number("attn_logit_softcapping", ATTN_SOFTCAP),
        final_softcap=keys.number("final_logit_softcapping", FINAL_SOFTCAP),
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="gemma2",
        models="Gemma 2",
        hf_architectures=("Gemma2ForCausalLM",),
        gguf_architectures=("gemma2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=gemma3.build,
    ),
)
