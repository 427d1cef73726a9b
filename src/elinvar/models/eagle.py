"""EAGLE heads (nn/eagle.py) as they are published: a folder of their own beside the target's, with a
config.json that describes their layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models.keys import Keys
from elinvar.models.llama import config_from_hf
from elinvar.models.shared import (
    HF,
    TO,
    attention_rules,
    bias_rules,
    by_layer,
    mlp_rules,
    norm_rules,
    qkv_bias,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Decoder
from elinvar.nn.eagle import Eagle3Head, EagleHead, EagleLayer
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import RMSNorm
from elinvar.nn.rope import RopeTable
from elinvar.ops.api import I32, Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import Rule

FIRST, THIRD = "layers.0.", "midlayer."
"""Before the names of the layer, of which the last tells the two apart."""
_JOIN = "fc.weight"
_MLP_NORM = {"mlp_norm": ("post_attention_layernorm", "")}
_NORMS = {"embed_norm": ("input_layernorm", ""), "hidden_norm": ("hidden_norm", "")}


def is_eagle(checkpoint: Checkpoint) -> bool:
    """Whether it holds such a head, of either kind."""
    query = "self_attn.q_proj.weight"
    return _JOIN in checkpoint.tensors and not checkpoint.tensors.keys().isdisjoint(
        (FIRST + query, THIRD + query)
    )


def is_third(checkpoint: Checkpoint) -> bool:
    return f"{THIRD}self_attn.q_proj.weight" in checkpoint.tensors


def load_eagle(
    checkpoint: Checkpoint,
    target: Decoder,
    ops: Ops,
    weight_format: Any = "auto",
    cache_dir: Path | None = None,
) -> EagleHead:
    """The head for `target`, whose cache has a layer more from then on. Raises ModelError where they do
    not fit."""
    keys, third = Keys(checkpoint.metadata, "config.json"), is_third(checkpoint)
    config = config_from_hf(checkpoint.metadata)
    _check(checkpoint, config, target)
    w: dict[str, Any] = {}
    also = weight_format, cache_dir
    if not third:
        w |= load_weights(checkpoint, eagle_rules(config), config, *also, stored=ops.stored)
        ops.prepare(w, beside=True)
        return EagleHead(target, _layer(config, w, ops), w["join"], w.get("join_bias"))
    taps = _taps(keys, target.config.num_layers)
    tokens_C = _tokens(checkpoint, target.config.vocab_size)
    count = target.config.vocab_size if tokens_C is None else len(tokens_C)
    rules = eagle3_rules(config, len(taps), count)
    w |= load_weights(checkpoint, rules, config, *also, stored=ops.stored)
    ops.prepare(w, beside=True)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(w[name], config.norm_eps, ops)

    norms = norm("layers.0.embed_norm"), norm("layers.0.hidden_norm"), norm("norm")
    layer = _layer(config, w, ops)
    return Eagle3Head(target, layer, w["join"], taps, norms, w["head"], tokens_C)


def eagle_rules(config: ModelConfig) -> list[Rule]:
    d = config.dim
    return [
        Rule("join", _JOIN, None, (d, 2 * d)),
        Rule("join_bias", "fc.bias", None, (d,), optional=True),
        *_of_layer(config, FIRST, attention_rules(config)),
    ]


def eagle3_rules(config: ModelConfig, num_taps: int, num_tokens: int) -> list[Rule]:
    d = config.dim
    attention = [
        # It sees embedding and state side by side.
        replace(rule, shape=(rule.shape[0], 2 * d)) if rule.name[-1] in "qkv" else rule
        for rule in attention_rules(config)
        if rule.shape is not None
    ]
    return [
        Rule("join", _JOIN, None, (d, num_taps * d)),
        Rule("norm", "norm.weight", None, (d,)),
        Rule("head", "lm_head.weight", None, (num_tokens, d)),
        *_of_layer(config, THIRD, [*attention, *norm_rules(_NORMS, d)]),
    ]


def _of_layer(config: ModelConfig, prefix: str, attention: list[Rule]) -> list[Rule]:
    rules = [
        *attention,
        *bias_rules(config, optional=True),
        *norm_rules(_MLP_NORM, config.dim),
        *mlp_rules(config),
    ]
    return [
        replace(
            rule,
            name=rule.name.replace(TO, "layers.0."),
            hf=rule.hf and rule.hf.replace(HF, prefix),
            gguf=None,
        )
        for rule in rules
    ]


def _layer(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> EagleLayer:
    [w] = by_layer(weights, 1)
    qkv = w["q"], w["k"], w["v"]
    return EagleLayer(
        Attention(config, 0, qkv, w["o"], ops, qkv_bias=qkv_bias(w)),
        RMSNorm(w["mlp_norm"], config.norm_eps, ops),
        GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops),
        RopeTable(config.rope["full"]),
    )


def _check(checkpoint: Checkpoint, config: ModelConfig, target: Decoder) -> None:
    [spec, *_] = target.kv_specs("f32")
    wanted = {
        "num_hidden_layers": (config.num_layers, 1),
        "hidden_size": (config.dim, target.config.dim),
        "num_key_value_heads": (config.num_kv_heads, spec.num_kv_heads),
        "head_dim": (config.head_dim, spec.head_dim),
    }
    for key, (found, needed) in wanted.items():
        if found != needed:
            raise ModelError(
                f"{checkpoint.path} has {key} = {found}, and heads for this model need {needed}; "
                "take those that were trained for it."
            )
    if spec.kind != "full" or spec.latent_dim is not None:
        raise ModelError(
            f"{checkpoint.path} cannot draft for this model: its layers keep no keys and values of "
            "all tokens, which an EAGLE head needs to have beside them."
        )


def default_taps(num_layers: int) -> list[int]:
    """The layers that a head sees where it says nothing: a low, a middle and a high one."""
    last = num_layers - 1
    return [min(1, last), max(num_layers // 2 - 1, 0), max(num_layers - 4, 0)]


def _taps(keys: Keys, num_layers: int) -> list[int]:
    """The layers that it sees."""
    named = keys.part("eagle_config").raw("eagle_aux_hidden_state_layer_ids")
    if named is None:
        named = default_taps(num_layers)
    right = isinstance(named, list) and all(
        isinstance(i, int) and 0 <= i < num_layers for i in named
    )
    if not right or not named:
        raise ModelError(
            f"config.json has eagle_aux_hidden_state_layer_ids = {named}, and the model has the layers "
            f"0 to {num_layers - 1}; take a head that was trained for it."
        )
    return [int(i) for i in named]


def _tokens(checkpoint: Checkpoint, vocab_size: int) -> I32 | None:
    """The target's ids of what the head can draft: d2t holds how far each lies from its own."""
    stored = checkpoint.tensors.get("d2t")
    if stored is None:
        return None
    if stored.dtype != "I64" or len(stored.shape) != 1:
        raise ModelError(
            f"The tensor d2t of {checkpoint.path} must be a vector of 64-bit integers."
        )
    offsets = stored.data.reshape(-1).view("<i8")
    tokens = np.arange(len(offsets)) + offsets
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
        raise ModelError(
            f"The tensor d2t of {checkpoint.path} names tokens that the model does not have; take a "
            "head that was trained for it."
        )
    return tokens.astype(np.int32)
