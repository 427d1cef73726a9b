"""ERNIE 4.5 with mixtures of experts (Baidu, 2025): chosen by softmax and bias, beside shared ones; rotary
pairs (2i, 2i + 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import ernie, llama
from elinvar.models.experts import MAX_EXPERTS, dense_rules, expert_rules, mixture
from elinvar.models.family import Family
from elinvar.models.keys import MAX_LAYERS, Keys
from elinvar.models.llama import NORMS
from elinvar.models.shared import HF, attention_rules, norm_rules, outer_rules
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

STATICS = HF + "mlp.moe_statics.e_score_correction_bias"


def rules(config: ModelConfig) -> list[Rule]:
    """The bias of the choice is a matrix of one row."""
    assert config.moe is not None
    turns = UnpermuteRows(config.num_heads), UnpermuteRows(config.num_kv_heads)
    row = Part((1, config.moe.num_experts))
    return [
        *norm_rules(NORMS, config.dim),
        *(replace(rule, hf_fix=rule.gguf_fix) for rule in attention_rules(config, *turns)),
        *dense_rules(config),
        *(
            replace(rule, hf=STATICS, hf_part=row, gguf_part=row)
            if rule.name.endswith(".bias")
            else rule
            for rule in expert_rules(config, shared="shared_experts")
        ),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("moe_gate", "topk")
    keys.only("moe_use_aux_free", True)
    dim, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    config = ernie.config_from_hf({"head_dim": dim // heads, **metadata})
    last = keys.raw("moe_layer_end_index")
    end = (
        config.num_layers
        if last in (None, -1)
        else keys.count("moe_layer_end_index", MAX_LAYERS) + 1
    )
    start, step = (
        keys.count("moe_layer_start_index", MAX_LAYERS),
        keys.size("moe_layer_interval", 1),
    )
    layers = tuple(i for i in range(start, min(end, config.num_layers)) if (i + 1) % step == 0)
    ff_dim, shared = keys.size("moe_intermediate_size"), "moe_num_shared_experts"
    return _mixture(config, keys, "moe_num_experts", "moe_k", ff_dim, shared, layers)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    config = ernie.config_from_gguf(metadata, tensors, "ernie4_5-moe.")
    keys = Keys(metadata, "The GGUF file", "ernie4_5-moe.")
    start = keys.count("leading_dense_block_count", MAX_LAYERS)
    step = keys.size("interleave_moe_layer_step", 1)
    layers = tuple(i for i in range(start, config.num_layers) if (i + 1) % step == 0)
    ff_dim, shared = keys.size("expert_feed_forward_length"), "expert_shared_count"
    return _mixture(config, keys, "expert_count", "expert_used_count", ff_dim, shared, layers)


def _mixture(
    config: ModelConfig,
    keys: Keys,
    count: str,
    used: str,
    ff_dim: int,
    shared: str,
    layers: tuple[int, ...],
) -> ModelConfig:
    shared_ff_dim = keys.count(shared, MAX_EXPERTS) * ff_dim
    how: dict[str, Any] = {"renormalise": True, "biased": True, "shared_ff_dim": shared_ff_dim}
    moe = mixture(keys, count, used, ff_dim, layers, **how)
    return replace(config, family="ernie_moe", moe=moe)


FAMILIES = (
    Family(
        name="ernie_moe",
        models="ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B",
        hf_architectures=("Ernie4_5_MoeForCausalLM",),
        gguf_architectures=("ernie4_5-moe",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
