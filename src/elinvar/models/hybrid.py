"""What families of gated delta nets have in common: three layers whose memory is a state of fixed size to
one of attention with an output gate, mixtures of experts with a shared one. Checkpoints differ in
how they store what a delta net multiplies its input by.

Gains are stored without their 1, but for those of the delta nets' heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from elinvar.base.config import DeltaConfig, LayerKind, ModelConfig, MoEConfig
from elinvar.models.experts import dense_rules, expert_rules, feeds, mixture
from elinvar.models.keys import MAX_HEAD_DIM, MAX_TAPS, Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.mtp import decoder
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.qwen_moe import layers_with_experts
from elinvar.models.shared import (
    HF,
    TO,
    attention_rules,
    by_layer,
    kinds_from_hf,
    mlp_rules,
    norm_rules,
    one_rope_from_hf,
    outer_rules,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Attends, Block, Decoder
from elinvar.nn.delta import DeltaNet, DeltaWeights
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.fixes import AddOne
from elinvar.weights.rules import Part, Rule

LAYER_TYPES: dict[str, LayerKind] = {"full_attention": "full", "linear_attention": "linear"}
HEAD_DIM, ROTATED = 256, 0.25
DELTA = HF + "linear_attn."
DELTA_NAMES = tuple(field.name for field in fields(DeltaWeights))


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        mixer: Attends
        if config.layer_kinds[i] == "linear":
            mixer = DeltaNet(config, DeltaWeights(**{name: w[name] for name in DELTA_NAMES}), ops)
        else:
            qkv, gains = (w["q"], w["k"], w["v"]), (w["q_norm"], w["k_norm"])
            mixer = Attention(config, i, qkv, w["o"], ops, *gains, gate=w["gate_o"])
        return Block(norm(w["attn_norm"]), mixer, norm(w["mlp_norm"]), feeds(config, w, ops))

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]

    def head_layer(w: dict[str, Any]) -> Block:
        return block(config.layer_kinds.index("full"), w)

    return decoder(config, weights, ops, blocks, norm, head_layer)


def common_rules(config: ModelConfig) -> list[Rule]:
    mlps = mlp_rules(config)
    if config.moe is not None:
        mlps = [*dense_rules(config), *expert_rules(config)]
    gated = [
        *norm_rules(HEAD_NORMS, config.head_dim, AddOne()),
        *(rule for rule in attention_rules(config) if rule.name != TO + "q"),
        *_gated_query_rules(config),
    ]
    return [
        *norm_rules(NORMS, config.dim, AddOne()),
        *on_layers(config, "full", gated),
        *on_layers(config, "linear", _state_rules(config)),
        *mlps,
        *outer_rules(config, AddOne()),
    ]


def on_layers(config: ModelConfig, kind: LayerKind, rules: Sequence[Rule]) -> list[Rule]:
    layers = [i for i, k in enumerate(config.layer_kinds) if k == kind]
    return [replace(rule, layers=tuple(layers)) for rule in rules]


def _gated_query_rules(config: ModelConfig) -> list[Rule]:
    """Each head's query is followed by its gate."""
    rows, d, n = config.num_heads * config.head_dim, config.dim, config.head_dim
    name = HF + "self_attn.q_proj.weight"
    return [
        Rule(to, name, None, (rows, d), hf_part=Part((2 * rows, d), start, n, 2 * n))
        for to, start in ((TO + "q", 0), (TO + "gate_o", n))
    ]


def _state_rules(config: ModelConfig) -> list[Rule]:
    c, d = config.delta, config.dim
    if c is None:
        return []
    keys, values, whole = c.key_heads * c.key_dim, c.heads * c.value_dim, (c.channels, 1, c.taps)
    parts = (("q", keys, 0), ("k", keys, keys), ("v", values, 2 * keys))
    convolution = [
        Rule(
            f"{TO}conv_{name}",
            DELTA + "conv1d.weight",
            None,
            (rows * c.taps,),
            hf_part=Part(whole, start * c.taps),
        )
        for name, rows, start in parts
    ]
    return [
        *convolution,
        Rule(TO + "a_log", DELTA + "A_log", None, (c.heads,)),
        Rule(TO + "dt_bias", DELTA + "dt_bias", None, (c.heads,)),
        Rule(TO + "head_norm", DELTA + "norm.weight", None, (c.value_dim,)),
        Rule(TO + "delta_o", DELTA + "out_proj.weight", None, (d, c.heads * c.value_dim)),
    ]


def hybrid_from_hf(family: str, keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    sizes = sizes_from_hf(keys, HEAD_DIM)
    num_layers, every = sizes["num_layers"], keys.size("full_attention_interval", 4)
    by_interval = [
        LAYER_TYPES[f"{'linear' if (i + 1) % every else 'full'}_attention"]
        for i in range(num_layers)
    ]
    kinds = kinds_from_hf(keys, by_interval, LAYER_TYPES)
    config = ModelConfig(
        family=family,
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], partial=ROTATED)},
        moe=_moe_from_hf(keys, num_layers),
        delta=_delta_from_hf(keys) if "linear" in kinds else None,
        **sizes,
    )
    return checked(config, "config.json")


def _delta_from_hf(keys: Keys) -> DeltaConfig:
    key_heads, heads = keys.size("linear_num_key_heads"), keys.size("linear_num_value_heads")
    if heads % key_heads:
        raise keys.bad("linear_num_value_heads", f"a multiple of {key_heads} key heads")
    return DeltaConfig(
        key_heads,
        heads,
        key_dim=keys.size("linear_key_head_dim", largest=MAX_HEAD_DIM),
        value_dim=keys.size("linear_value_head_dim", largest=MAX_HEAD_DIM),
        taps=keys.size("linear_conv_kernel_dim", largest=MAX_TAPS),
    )


def _moe_from_hf(keys: Keys, num_layers: int) -> MoEConfig | None:
    layers = layers_with_experts(keys, num_layers)
    if not layers or not keys.raw("num_experts"):
        return None
    return mixture(
        keys,
        "num_experts",
        "num_experts_per_tok",
        ff_dim=keys.size("moe_intermediate_size"),
        layers=layers,
        renormalise=keys.flag("norm_topk_prob", True),
        shared_ff_dim=keys.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )
