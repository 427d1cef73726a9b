"""Qwen 2 MoE and Qwen 3 MoE (Qwen Team, 2024 and 2025): mixtures of many small experts.

Qwen 2 has biases on q, k and v, and an expert that every token goes through behind a gate; Qwen 3 an
RMS norm on every head of q and k. Layers without experts have a dense MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig, MoEConfig
from elinvar.models import llama
from elinvar.models.experts import MAX_EXPERTS, dense_rules, expert_rules, mixture
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    bias_rules,
    kinds_from_hf,
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
    qwen2 = config.family == "qwen2_moe"
    return [
        *norm_rules(NORMS, config.dim),
        *attention_rules(config),
        *(bias_rules(config) if qwen2 else norm_rules(HEAD_NORMS, config.head_dim)),
        *dense_rules(config),
        *expert_rules(config),
        *outer_rules(config),
    ]


def qwen2_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("qkv_bias", True)
    shared_ff_dim = keys.size("shared_expert_intermediate_size")
    return _from_hf("qwen2_moe", keys, shared_ff_dim)


def qwen3_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(metadata, "config.json")
    keys.only("attention_bias", False)
    return _from_hf("qwen3_moe", keys)


def _from_hf(family: str, keys: Keys, shared_ff_dim: int = 0) -> ModelConfig:
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    num_layers = sizes["num_layers"]
    windowed = keys.flag("use_sliding_window", False) and keys.has("sliding_window")
    kind: LayerKind = "sliding" if windowed else "full"
    kinds = kinds_from_hf(keys, (kind,) * num_layers)
    count = "num_experts" if keys.has("num_experts") else "num_local_experts"
    moe = mixture(
        keys,
        count,
        "num_experts_per_tok",
        ff_dim=keys.size("moe_intermediate_size"),
        layers=layers_with_experts(keys, num_layers),
        renormalise=keys.flag("norm_topk_prob", False),
        shared_ff_dim=shared_ff_dim,
        shared_gate=shared_ff_dim > 0,
    )
    config = ModelConfig(
        family=family,
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, one_rope_from_hf(keys, sizes["head_dim"])),
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        moe=moe,
        **sizes,
    )
    return checked(config, "config.json")


def layers_with_experts(keys: Keys, num_layers: int) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step, dense = keys.size("decoder_sparse_step", 1), keys.raw("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise keys.bad("mlp_only_layers", "a list of layers")
    return tuple(i for i in range(step - 1, num_layers, step) if i not in dense)


def qwen2_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    return _from_gguf("qwen2_moe", Keys(metadata, "The GGUF file", "qwen2moe."), tensors)


def qwen3_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    return _from_gguf("qwen3_moe", Keys(metadata, "The GGUF file", "qwen3moe."), tensors)


def _from_gguf(family: str, keys: Keys, tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """The files do not say norm_topk_prob: every Qwen 3 has it and no Qwen 2. They know no layers
    without experts, and old ones do not say how large the experts are."""
    qwen2 = family == "qwen2_moe"
    sizes = sizes_from_gguf(keys, tensors)
    num_experts, dense = keys.size("expert_count", largest=MAX_EXPERTS), sizes["ff_dim"]
    top_k = keys.size("expert_used_count", largest=num_experts)
    moe = MoEConfig(
        num_experts,
        top_k,
        ff_dim=keys.size("expert_feed_forward_length", dense // top_k),
        layers=tuple(range(sizes["num_layers"])),
        renormalise=not qwen2,
        shared_ff_dim=keys.size("expert_shared_feed_forward_length", dense) if qwen2 else 0,
        shared_gate=qwen2,
    )
    config = ModelConfig(
        family=family,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"], base=1_000_000.0)},
        moe=moe,
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="qwen2_moe",
        models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        hf_architectures=("Qwen2MoeForCausalLM",),
        gguf_architectures=("qwen2moe",),
        config_from_hf=qwen2_from_hf,
        config_from_gguf=qwen2_from_gguf,
        rules=rules,
        build=llama.build,
    ),
    Family(
        name="qwen3_moe",
        models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        hf_architectures=("Qwen3MoeForCausalLM",),
        gguf_architectures=("qwen3moe",),
        config_from_hf=qwen3_from_hf,
        config_from_gguf=qwen3_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
