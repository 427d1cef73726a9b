"""EXAONE 4 (LG AI Research, 2025): OLMo 2's blocks with norms on every head of q and k; the large one has
sliding windows on three layers of four, and positions on those alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig, RopeConfig
from elinvar.models import olmo2
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.olmo2 import PATTERN, POST_NORMS
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    every_nth_full,
    kinds_from_gguf,
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


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(POST_NORMS, config.dim),
        *norm_rules(HEAD_NORMS, config.head_dim),
        *attention_rules(config),
        *mlp_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    kinds: tuple[LayerKind, ...] = FULL * sizes["num_layers"]
    if keys.has("sliding_window"):
        kinds = kinds_from_hf(keys, every_nth_full(PATTERN, sizes["num_layers"]))
        keys.only("sliding_window_pattern", PATTERN, "LLLG")
    rope = one_rope_from_hf(keys, sizes["head_dim"])
    window = keys.size("sliding_window") if keys.has("sliding_window") else None
    return _config(sizes, kinds, rope, window, keys.number("rms_norm_eps"), "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "exaone4.")
    sizes = sizes_from_gguf(keys, tensors)
    kinds: tuple[LayerKind, ...] = FULL * sizes["num_layers"]
    window = None
    if keys.has("attention.sliding_window"):
        kinds = kinds_from_gguf(keys, sizes["num_layers"], PATTERN)
        window = keys.size("attention.sliding_window")
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"])
    eps = keys.number("attention.layer_norm_rms_epsilon")
    return _config(sizes, kinds, rope, window, eps, "The GGUF file")


def _config(
    sizes: Mapping[str, Any],
    kinds: tuple[LayerKind, ...],
    rope: RopeConfig,
    window: int | None,
    eps: float,
    source: str,
) -> ModelConfig:
    """Where there is a window, layers without it have no positions."""
    full = rope if window is None else RopeConfig(rope.base, 0)
    ropes: dict[LayerKind, RopeConfig] = {"full": full, "sliding": rope}
    config = ModelConfig(
        family="exaone4",
        norm_eps=eps,
        layer_kinds=kinds,
        rope={kind: ropes[kind] for kind in kinds},
        window=window,
        **sizes,
    )
    return checked(config, source)


FAMILIES = (
    Family(
        name="exaone4",
        models="EXAONE 4.0",
        hf_architectures=("Exaone4ForCausalLM",),
        gguf_architectures=("exaone4",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=olmo2.build,
    ),
)
