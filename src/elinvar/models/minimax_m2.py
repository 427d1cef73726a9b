"""MiniMax-M2 (MiniMax, 2025): a mixture of experts in every layer, chosen by sigmoid and bias; one norm
over all heads of q and one over all of k, rotary positions on a part of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig, MoEConfig, RopeConfig
from elinvar.models import llama
from elinvar.models.experts import expert_rules, mixture
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.olmo2 import whole_norm_rules
from elinvar.models.shared import (
    FULL,
    attention_rules,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

BASE = 5_000_000.0
_SIGMOID = 2
"""Of expert_gating_func."""


def rules(config: ModelConfig) -> list[Rule]:
    """The bias of the choice lies beside the router, not in it."""
    experts = expert_rules(config, "block_sparse_moe", ("w1", "w3", "w2"))
    return [
        *norm_rules(NORMS, config.dim),
        *whole_norm_rules(config),
        *attention_rules(config),
        *(replace(r, hf=(r.hf or "").replace("gate.e_score", "e_score")) for r in experts),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("use_qk_norm", True)
    keys.only("qk_norm_type", "per_layer")
    keys.only("scoring_func", "sigmoid")
    keys.only("use_routing_bias", True)
    keys.only("shared_intermediate_size", 0)
    sizes = sizes_from_hf(keys, 128)
    head_dim = sizes["head_dim"]
    part = keys.size("rotary_dim", head_dim, largest=head_dim) / head_dim
    rope = one_rope_from_hf(keys, head_dim, BASE, part)
    moe = _mixture(keys, "num_local_experts", "num_experts_per_tok", sizes)
    return checked(_config(sizes, rope, moe, keys.number("rms_norm_eps")), "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "minimax-m2.")
    keys.only("expert_gating_func", _SIGMOID)
    sizes = sizes_from_gguf(keys, tensors)
    sizes["ff_dim"] = keys.size("expert_feed_forward_length", sizes["ff_dim"])
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"], BASE)
    moe = _mixture(keys, "expert_count", "expert_used_count", sizes)
    eps = keys.number("attention.layer_norm_rms_epsilon")
    return checked(_config(sizes, rope, moe, eps), "The GGUF file")


def _mixture(keys: Keys, count_key: str, used_key: str, sizes: Mapping[str, Any]) -> MoEConfig:
    how: dict[str, Any] = {"scoring": "sigmoid", "renormalise": True, "biased": True}
    return mixture(keys, count_key, used_key, sizes["ff_dim"], range(sizes["num_layers"]), **how)


def _config(sizes: Mapping[str, Any], rope: RopeConfig, moe: MoEConfig, eps: float) -> ModelConfig:
    return ModelConfig(
        family="minimax_m2",
        norm_eps=eps,
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": rope},
        moe=moe,
        **sizes,
    )


FAMILIES = (
    Family(
        name="minimax_m2",
        models="MiniMax-M2, M2.1",
        hf_architectures=("MiniMaxM2ForCausalLM",),
        gguf_architectures=("minimax-m2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
