"""Qwen 3 (Qwen Team, 2025): Llama's blocks with an RMS norm on every head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    kinds_from_hf,
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
HEAD_NORMS = {
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
}


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(NORMS, config.dim),
        *norm_rules(HEAD_NORMS, config.head_dim),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    sizes = sizes_from_hf(keys, HEAD_DIM)
    kinds = window_kinds(keys, sizes["num_layers"])
    rope = one_rope_from_hf(keys, sizes["head_dim"])
    config = ModelConfig(
        family="qwen3",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, rope),
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        **sizes,
    )
    return checked(config, "config.json")


def window_kinds(keys: Keys, num_layers: int) -> tuple[LayerKind, ...]:
    """Qwen's own way to say it: sliding from layer max_window_layers on, if at all."""
    if not keys.flag("use_sliding_window", False) or not keys.has("sliding_window"):
        return kinds_from_hf(keys, FULL * num_layers)
    first = keys.raw("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise keys.bad("max_window_layers", "a whole number from 0 up")
    sliding: LayerKind = "sliding"
    return kinds_from_hf(keys, ["full" if i < first else sliding for i in range(num_layers)])


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "qwen3.")
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"], base=1_000_000.0)
    config = ModelConfig(
        family="qwen3",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": rope},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="qwen3",
        models="Qwen3 (dense)",
        hf_architectures=("Qwen3ForCausalLM",),
        gguf_architectures=("qwen3",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
