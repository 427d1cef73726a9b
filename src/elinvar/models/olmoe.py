"""OLMoE (Muennighoff et al., 2024): a mixture of experts in every layer, and as in OLMo 2 one norm over all
heads of q and one over all of k.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def rules(config: ModelConfig) -> list[Rule]:
    return [
        *norm_rules(NORMS, config.dim),
        *whole_norm_rules(config),
        *attention_rules(config),
        *expert_rules(config),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("clip_qkv")
    sizes = sizes_from_hf(keys)
    renormalise = keys.flag("norm_topk_prob", False)
    moe = _mixture(keys, "num_experts", "num_experts_per_tok", sizes, renormalise)
    rope = one_rope_from_hf(keys, sizes["head_dim"])
    return checked(_config(sizes, rope, moe, keys.number("rms_norm_eps")), "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "olmoe.")
    keys.only("attention.clamp_kqv")
    sizes = sizes_from_gguf(keys, tensors)
    moe = _mixture(keys, "expert_count", "expert_used_count", sizes, renormalise=False)
    rope = one_rope_from_gguf(keys, tensors, sizes["head_dim"])
    eps = keys.number("attention.layer_norm_rms_epsilon")
    return checked(_config(sizes, rope, moe, eps), "The GGUF file")


def _mixture(
    keys: Keys, count_key: str, used_key: str, sizes: Mapping[str, Any], renormalise: bool
) -> MoEConfig:
    layers = range(sizes["num_layers"])
    return mixture(keys, count_key, used_key, sizes["ff_dim"], layers, renormalise=renormalise)


def _config(sizes: Mapping[str, Any], rope: RopeConfig, moe: MoEConfig, eps: float) -> ModelConfig:
    return ModelConfig(
        family="olmoe",
        norm_eps=eps,
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": rope},
        moe=moe,
        **sizes,
    )


FAMILIES = (
    Family(
        name="olmoe",
        models="OLMoE-1B-7B",
        hf_architectures=("OlmoeForCausalLM",),
        gguf_architectures=("olmoe",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
