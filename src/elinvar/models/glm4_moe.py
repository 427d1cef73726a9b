"""GLM-4.5 and 4.6 (GLM-4.5 Team, 2025): after the first layers mixtures of experts as DeepSeek V3 has
them; rotary positions on half of each head, biases on q, k and v, perhaps norms on heads of q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig, MoEConfig
from elinvar.models import llama
from elinvar.models.deepseek import moe_from_hf
from elinvar.models.experts import MAX_EXPERTS, dense_rules, expert_rules, mixture
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.mtp import NEXTN
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.shared import (
    FULL,
    attention_rules,
    bias_rules,
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

NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "post_attention_norm"),
}
_SIGMOID = 2
"""Of expert_gating_func."""


def rules(config: ModelConfig) -> list[Rule]:
    """Layers beyond config.num_layers are heads that predict further tokens."""
    mlps = mlp_rules(config)
    if config.moe is not None:
        mlps = [*dense_rules(config), *expert_rules(config, shared="shared_experts")]
    return [
        *norm_rules(NORMS, config.dim),
        *(replace(rule, optional=True) for rule in norm_rules(HEAD_NORMS, config.head_dim)),
        *attention_rules(config),
        *bias_rules(config, optional=True),
        *mlps,
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    config = ModelConfig(
        family="glm4_moe",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], partial=0.5)},
        moe=moe_from_hf(keys, sizes["num_layers"], "noaux_tc"),
        mtp_layers=keys.count("num_nextn_predict_layers"),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "glm4moe.")
    sizes = sizes_from_gguf(keys, tensors)
    heads = keys.count("nextn_predict_layers", sizes["num_layers"] - 1)
    sizes["num_layers"] -= heads
    config = ModelConfig(
        family="glm4_moe",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        moe=_moe_from_gguf(keys, sizes["num_layers"]),
        mtp_layers=heads,
        **sizes,
    )
    return checked(config, "The GGUF file")


def _moe_from_gguf(keys: Keys, num_layers: int) -> MoEConfig:
    """GLM has no groups of experts; files do not speak of them."""
    keys.only("expert_gating_func", _SIGMOID)
    keys.only("expert_group_count", 1)
    ff_dim = keys.size("expert_feed_forward_length")
    return mixture(
        keys,
        "expert_count",
        "expert_used_count",
        ff_dim=ff_dim,
        layers=tuple(range(keys.count("leading_dense_block_count", num_layers), num_layers)),
        scoring="sigmoid",
        renormalise=keys.flag("expert_weights_norm", True),
        scaling=keys.number("expert_weights_scale", 1.0),
        biased=True,
        shared_ff_dim=keys.count("expert_shared_count", MAX_EXPERTS) * ff_dim,
    )


FAMILIES = (
    Family(
        name="glm4_moe",
        models="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
        hf_architectures=("Glm4MoeForCausalLM",),
        gguf_architectures=("glm4moe",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
        mtp=NEXTN,
    ),
)
