"""Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in every layer. llama.cpp calls it
llama, with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import llama, mistral
from elinvar.models.experts import expert_rules, mixture
from elinvar.models.family import Family
from elinvar.models.keys import Keys
from elinvar.models.llama import NORMS
from elinvar.models.shared import attention_rules, norm_rules, outer_rules
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    q_fix, k_fix = UnpermuteRows(config.num_heads), UnpermuteRows(config.num_kv_heads)
    return [
        *norm_rules(NORMS, config.dim),
        *attention_rules(config, q_fix, k_fix),
        *expert_rules(config, "block_sparse_moe", ("w1", "w3", "w2")),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    return _mixture(
        mistral.config_from_hf(metadata), keys, "num_local_experts", "num_experts_per_tok"
    )


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors: Llama's, but for the experts."""
    dense = llama.config_from_gguf({**metadata, "llama.expert_count": 0}, tensors)
    keys = Keys(metadata, "The GGUF file", "llama.")
    return _mixture(dense, keys, "expert_count", "expert_used_count")


def _mixture(config: ModelConfig, keys: Keys, count_key: str, used_key: str) -> ModelConfig:
    layers = range(config.num_layers)
    moe = mixture(keys, count_key, used_key, config.ff_dim, layers, renormalise=True)
    return replace(config, family="mixtral", moe=moe)


FAMILIES = (
    Family(
        name="mixtral",
        models="Mixtral 8x7B, 8x22B",
        hf_architectures=("MixtralForCausalLM",),
        gguf_architectures=("llama with experts",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
