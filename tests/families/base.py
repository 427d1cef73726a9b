"""What the tables are made of, and what several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elinvar.base.config import ModelConfig, RopeConfig

VOCAB = 288
"""Of the tiny engines: a tokenizer of bytes, and some."""

LLAMA = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ff_dim=96,
    max_context=512,
    norm_eps=1e-5,
    layer_kinds=("full", "full"),
    rope={"full": RopeConfig(10000.0, 16)},
    attn_scale=0.25,
)


Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Published:
    """How a model lies that was published with code of its own and that transformers has no class for.
    An equivalent one of transformers is saved in this layout."""

    architecture: str
    config: Callable[[dict[str, Any]], dict[str, Any]]
    """From transformers' config.json."""
    tensors: Callable[[dict[str, Any], Tensors], Tensors]
    """From transformers' config.json and model.safetensors."""


@dataclass(frozen=True)
class Case:
    """A model that transformers makes, with random weights and every switch of the family on."""

    family: str
    architecture: str
    """Class of the model in transformers."""
    config: str
    """Class of its configuration."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Besides SIZES."""
    published: Published | None = None
    """Where another layout is the family's than that of transformers."""
    around: dict[str, Any] | None = None
    """Of a model that also sees: what is beside its text_config, which has the settings."""


SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""Of the smallest eyes, for models that also see."""

FULL_AND_SLIDING = ["full_attention", "sliding_attention", "full_attention"]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
