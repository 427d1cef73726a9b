"""GGUF files of DeepSeek V2 and V3, llama.cpp's architecture deepseek2, and of those after them.

Rotated rows lie in interleaved pairs there as in checkpoints. Files made before latent attention was
absorbed in llama.cpp (2025) count all heads as key-value heads and hold kv_b whole; the names of
both kinds are in deepseek.latent_rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from elinvar.models.experts import MAX_EXPERTS
from elinvar.models.keys import MAX_LAYERS, Keys, checked, vocab_size_from_gguf
from elinvar.models.shared import FULL, one_rope_from_gguf
from elinvar.nn.rope import MAX_POSITIONS, yarn_mscale
from elinvar.ops.layout import PANEL
from elinvar.weights.tensor import HostTensor

_GROUPS = {160: (8, 3), 256: (8, 4)}
"""Groups of experts, and how many are eligible, where a file does not say: by the number of experts
of what DeepSeek published before files did (V2; V3 and R1)."""
_SOFTMAX, _SIGMOID = 1, 2
"""Of expert_gating_func."""


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "deepseek2.")
    return latent_from_gguf("deepseek", keys, tensors)


def latent_from_gguf(
    family: str, keys: Keys, tensors: Mapping[str, HostTensor], glm: bool = False
) -> ModelConfig:
    """glm: what GLM-5's files leave out is GLM's."""
    num_layers = keys.size("block_count", largest=MAX_LAYERS)
    heads = keys.count("nextn_predict_layers", largest=num_layers - 1)
    num_layers -= heads  # they are counted, and come last
    latent, scale = _latent(keys)
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size_from_gguf(keys, tensors),
        dim=keys.size("embedding_length"),
        num_layers=num_layers,
        num_heads=keys.size("attention.head_count"),
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope_dim,
        ff_dim=keys.size("feed_forward_length"),
        max_context=min(keys.size("context_length"), MAX_POSITIONS),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * num_layers,
        rope={"full": _rope(keys, tensors, latent.rope_dim)},
        attn_scale=scale,
        tied_head="output.weight" not in tensors,
        moe=_moe(keys, tensors, num_layers, glm),
        latent=latent,
        mtp_layers=heads,
    )
    return checked(config, "The GGUF file")


def _latent(keys: Keys) -> tuple[LatentConfig, float]:
    """And the factor on scores. key_length is that of the latent in files that also give the one of
    a head, and a head's in older ones."""
    newer = keys.has("attention.key_length_mla")
    key, value = (f"attention.{n}_length{'_mla' if newer else ''}" for n in ("key", "value"))
    rope_dim, length = keys.size("rope.dimension_count"), keys.size(key)
    if length <= rope_dim:
        raise keys.bad(key, f"above the {rope_dim} dims of a head that are rotated")
    rank, value_dim = keys.size("attention.kv_lora_rank"), keys.size(value)
    for name, size in (("attention.kv_lora_rank", rank), (value, value_dim)):
        if size % PANEL:
            raise keys.bad(name, f"a multiple of {PANEL}")
    q_rank = keys.size("attention.q_lora_rank") if keys.has("attention.q_lora_rank") else None
    factor = keys.number("rope.scaling.factor", 1.0, smallest=1)
    # A tenth of the checkpoint's mscale_all_dim.
    mscale = 10 * keys.number("rope.scaling.yarn_log_multiplier", 0.0, smallest=0)
    scale = length**-0.5 * yarn_mscale(factor, mscale) ** 2
    return LatentConfig(rank, length - rope_dim, rope_dim, value_dim, q_rank), scale


def _rope(keys: Keys, tensors: Mapping[str, HostTensor], rope_dim: int) -> RopeConfig:
    """YaRN's factor is all in the scale: DeepSeek's checkpoints have mscale = mscale_all_dim."""
    for name in ("attn_factor", "yarn_attn_factor"):
        keys.only(f"rope.scaling.{name}", 1.0)
    rope = one_rope_from_gguf(keys, tensors, rope_dim)
    return replace(rope, attention_factor=1.0)


def _moe(
    keys: Keys, tensors: Mapping[str, HostTensor], num_layers: int, glm: bool
) -> MoEConfig | None:
    dense = keys.count("leading_dense_block_count")
    num_experts = keys.count("expert_count", largest=MAX_EXPERTS)
    if dense >= num_layers or not num_experts:
        return None
    keys.only("expert_gating_func", _SOFTMAX, _SIGMOID)
    sigmoid = (keys.raw("expert_gating_func") or (_SIGMOID if glm else _SOFTMAX)) == _SIGMOID
    groups, eligible = (1, 1) if glm else _GROUPS.get(num_experts, (1, 1))
    groups = keys.size("expert_group_count", groups)
    if num_experts % groups:
        raise keys.bad("expert_group_count", f"a divisor of {num_experts} experts")
    eligible = keys.size("expert_group_used_count", min(eligible, groups), largest=groups)
    ff_dim = keys.size("expert_feed_forward_length")
    return MoEConfig(
        num_experts,
        top_k=keys.size("expert_used_count", largest=num_experts // groups * eligible),
        ff_dim=ff_dim,
        layers=tuple(range(dense, num_layers)),
        scoring="sigmoid" if sigmoid else "softmax",
        renormalise=keys.flag("expert_weights_norm", False),
        scaling=keys.number("expert_weights_scale", 1.0),
        biased=f"blk.{dense}.exp_probs_b.bias" in tensors,
        num_groups=groups,
        top_groups=eligible,
        shared_ff_dim=keys.count("expert_shared_count", largest=MAX_EXPERTS) * ff_dim,
    )
