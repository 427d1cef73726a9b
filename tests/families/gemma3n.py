"""Gemma 3n: several streams, shared keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from elinvar.base.config import StreamsConfig
from families.base import Case, Published, Tensors
from families.gemma import GEMMA3

GEMMA3N = replace(
    GEMMA3,
    family="gemma3n",
    num_layers=4,
    layer_kinds=("sliding", "full", "full", "sliding"),
    final_softcap=2.5,
    streams=StreamsConfig(3, 32, 32, 280, 2, (1.0, None, None, None), True),
)


def _gemma3n(**settings: Any) -> Case:
    plain = {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
        "laurel_rank": 12,
        "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": 91,
        "activation_sparsity_pattern": [0.8, 0.5, 0.0, 0.95, 0.0],
        "intermediate_size": [112] * 5,
    }
    return Case("gemma3n", "Gemma3nForCausalLM", "Gemma3nTextConfig", plain | settings)


def _beside_eyes(config: dict[str, Any]) -> dict[str, Any]:
    return {"text_config": config, "vision_config": {"hidden_size": 32}}


def _renamed(config: dict[str, Any], tensors: Tensors) -> Tensors:
    tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    return tensors | {"model.vision_tower.weight": np.zeros(4, np.float32)}


ENGINES = (GEMMA3N,)

CASES = {
    # Transformers' class needs a package for what sees.
    "gemma3n-sees": replace(
        _gemma3n(activation_sparsity_pattern=[0.0, 0.0, 0.9, 0.9, 0.0]),
        published=Published("Gemma3nForConditionalGeneration", _beside_eyes, _renamed),
    ),
    "gemma3n": _gemma3n(
        num_hidden_layers=7,
        layer_types=None,
        activation_sparsity_pattern=[0.8, 0.5, 0.0, 0.95, 0.0, 0.0, 0.9],
        intermediate_size=[112] * 7,
    ),
    "gemma3n-plain": _gemma3n(
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        altup_correct_scale=False,
        activation_sparsity_pattern=None,
        tie_word_embeddings=False,
        final_logit_softcapping=2.5,
        head_dim=32,
    ),
}
