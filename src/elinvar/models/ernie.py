"""ERNIE 4.5 (Baidu, 2025), dense: Llama's blocks with rotary pairs (2i, 2i + 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

HEAD_DIM, BASE = 128, 500_000.0


def rules(config: ModelConfig) -> list[Rule]:
    """Checkpoints have the pairs as llama.cpp's converter makes Llama's."""
    return [
        replace(rule, hf_fix=rule.gguf_fix) if isinstance(rule.gguf_fix, UnpermuteRows) else rule
        for rule in llama.rules(config)
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("use_bias", False)
    sizes = sizes_from_hf(keys, HEAD_DIM, tied=True)
    config = ModelConfig(
        family="ernie",
        norm_eps=keys.number("rms_norm_eps", 1e-5),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], BASE)},
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor], prefix: str = "ernie4_5."
) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. prefix: of the
    keys."""
    keys = Keys(metadata, "The GGUF file", prefix)
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    config = ModelConfig(
        family="ernie",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"], BASE)},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="ernie",
        models="ERNIE-4.5-0.3B",
        hf_architectures=("Ernie4_5ForCausalLM",),
        gguf_architectures=("ernie4_5",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
