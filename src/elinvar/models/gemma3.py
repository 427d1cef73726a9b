"""Gemma 3, text only (Gemma Team, 2025).

Five sliding-window layers to a full one, each kind with its own rotary base; RMS norms before
and after attention and MLP, and on every head of q and k; GeGLU; a tied head.

Legend: T tokens of this step, D model dim, P positions, L rows that need logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, LayerKind, ModelConfig, RopeConfig
from elinvar.models.keys import (
    MAX_LAYERS,
    Keys,
    checked,
    rope_factor_from_gguf,
    rope_from_hf,
    vocab_size_from_gguf,
)
from elinvar.nn.attention import Attention, kv_specs
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.rope import MAX_POSITIONS, RopeTable
from elinvar.ops.api import F32, KVLayer, Ops
from elinvar.weights.rules import AddOne, Rule
from elinvar.weights.tensor import HostTensor

SLIDING_BASE, FULL_BASE = 10_000.0, 1_000_000.0
PATTERN = 6
"""Every sixth layer is full."""


class Gemma3:
    """forward(): token ids to logits. Weights are bound once, context is an argument."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> None:
        self.config = config
        self.ops = ops
        self.ropes = {kind: RopeTable(config.rope[kind]) for kind in set(config.layer_kinds)}
        self.embed = weights["embed"]
        self.head = (weights["embed" if config.tied_head else "head"],)
        self.layers = [Gemma3Layer(config, i, weights, ops) for i in range(config.num_layers)]
        # Gains of the norms that follow each layer: the next layer's first one, then the last.
        self.gains = [layer.attn_norm for layer in self.layers] + [weights["norm"]]

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        return kv_specs(self.config, kv_dtype)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> F32:
        """Computes the batch's tokens, writes their keys and values to `kv` (one a layer), and
        returns the logits [L, V] of `batch.logit_rows`."""
        ops, eps = self.ops, self.config.norm_eps
        rope = {kind: table.upto(batch.num_positions) for kind, table in self.ropes.items()}
        x_TD = ops.embed(batch.input_ids, self.embed, self.config.embed_scale)
        h_TD = ops.rms_norm(x_TD, self.gains[0], eps)
        for layer, kv_layer, next_gain in zip(self.layers, kv, self.gains[1:], strict=True):
            a_TD = layer.attention(h_TD, rope[layer.attention.kind], batch, kv_layer)
            a_TD = ops.rms_norm(a_TD, layer.attn_post_norm, eps)
            if layer is self.layers[-1]:  # nothing after it looks at other tokens
                x_TD, a_TD = batch.where_logits(x_TD), batch.where_logits(a_TD)
            x_TD, h_TD = ops.add_rms_norm(x_TD, a_TD, layer.mlp_norm, eps)
            m_TD = layer.mlp(h_TD)
            m_TD = ops.rms_norm(m_TD, layer.mlp_post_norm, eps)
            x_TD, h_TD = ops.add_rms_norm(x_TD, m_TD, next_gain, eps)
        return ops.linear(h_TD, self.head)


class Gemma3Layer:
    def __init__(self, config: ModelConfig, i: int, weights: Mapping[str, Any], ops: Ops) -> None:
        w = {name: weights[f"layers.{i}.{name}"] for name in LAYER}
        self.attn_norm, self.attn_post_norm = w["attn_norm"], w["attn_post_norm"]
        self.mlp_norm, self.mlp_post_norm = w["mlp_norm"], w["mlp_post_norm"]
        qkv = (w["q"], w["k"], w["v"])
        self.attention = Attention(config, i, qkv, w["o"], ops, w["q_norm"], w["k_norm"])
        self.mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)


LAYER = (
    *("attn_norm", "q", "k", "v", "o", "q_norm", "k_norm", "attn_post_norm"),
    *("mlp_norm", "gate", "up", "down", "mlp_post_norm"),
)


def rules(config: ModelConfig) -> list[Rule]:
    """Where each weight lies. Hugging Face files hold the norms' gains without their 1."""
    d, f, v, h = config.dim, config.ff_dim, config.vocab_size, config.head_dim
    nq, nk = config.num_heads * h, config.num_kv_heads * h
    hf, gguf, to = "model.layers.{i}.", "blk.{i}.", "layers.{i}."
    attn, mlp = hf + "self_attn.", hf + "mlp."

    def gain(name: str, hf_name: str, gguf_name: str, size: int) -> Rule:
        return Rule(name, hf_name, gguf_name, (size,), hf_fix=AddOne())

    table = [
        Rule("embed", "model.embed_tokens.weight", "token_embd.weight", (v, d)),
        gain(to + "attn_norm", hf + "input_layernorm.weight", gguf + "attn_norm.weight", d),
        Rule(to + "q", attn + "q_proj.weight", gguf + "attn_q.weight", (nq, d)),
        Rule(to + "k", attn + "k_proj.weight", gguf + "attn_k.weight", (nk, d)),
        Rule(to + "v", attn + "v_proj.weight", gguf + "attn_v.weight", (nk, d)),
        Rule(to + "o", attn + "o_proj.weight", gguf + "attn_output.weight", (d, nq)),
        gain(to + "q_norm", attn + "q_norm.weight", gguf + "attn_q_norm.weight", h),
        gain(to + "k_norm", attn + "k_norm.weight", gguf + "attn_k_norm.weight", h),
        gain(
            to + "attn_post_norm",
            hf + "post_attention_layernorm.weight",
            gguf + "post_attention_norm.weight",
            d,
        ),
        gain(to + "mlp_norm", hf + "pre_feedforward_layernorm.weight", gguf + "ffn_norm.weight", d),
        Rule(to + "gate", mlp + "gate_proj.weight", gguf + "ffn_gate.weight", (f, d)),
        Rule(to + "up", mlp + "up_proj.weight", gguf + "ffn_up.weight", (f, d)),
        Rule(to + "down", mlp + "down_proj.weight", gguf + "ffn_down.weight", (d, f)),
        gain(
            to + "mlp_post_norm",
            hf + "post_feedforward_layernorm.weight",
            gguf + "post_ffw_norm.weight",
            d,
        ),
        gain("norm", "model.norm.weight", "output_norm.weight", d),
    ]
    if not config.tied_head:
        table.append(Rule("head", "lm_head.weight", "output.weight", (v, d)))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("use_bidirectional_attention", False)
    keys.only("final_logit_softcapping")
    keys.only("attn_logit_softcapping")
    dim, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    num_layers = keys.size("num_hidden_layers", largest=MAX_LAYERS)
    head_dim = keys.size("head_dim", 256)
    config = ModelConfig(
        family="gemma3",
        vocab_size=keys.size("vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=head_dim,
        ff_dim=keys.size("intermediate_size"),
        max_context=min(keys.size("max_position_embeddings"), MAX_POSITIONS),
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=_layer_kinds(keys, num_layers),
        rope=_rope_from_hf(keys, head_dim),
        attn_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        window=keys.size("sliding_window"),
        embed_scale=dim**0.5,
        activation="gelu_tanh",
        tied_head=keys.flag("tie_word_embeddings", True),
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "gemma3.")
    dim, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    num_layers = keys.size("block_count", largest=MAX_LAYERS)
    head_dim = keys.size("attention.key_length", 256)
    # The files do not say query_pre_attn_scalar. It is the head dim but for the 27B model.
    scalar = dim / heads if num_layers == 62 else head_dim
    pattern = keys.size("attention.sliding_window_pattern", PATTERN)
    full_base = keys.number("rope.freq_base", FULL_BASE, smallest=1)
    sliding_base = keys.number("rope.freq_base_swa", SLIDING_BASE, smallest=1)
    config = ModelConfig(
        family="gemma3",
        vocab_size=vocab_size_from_gguf(keys, tensors),
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        ff_dim=keys.size("feed_forward_length"),
        max_context=min(keys.size("context_length"), MAX_POSITIONS),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=_pattern_kinds(pattern, num_layers),
        rope={
            "full": RopeConfig(full_base, head_dim, factor=rope_factor_from_gguf(keys)),
            "sliding": RopeConfig(sliding_base, head_dim),
        },
        attn_scale=scalar**-0.5,
        window=keys.size("attention.sliding_window"),
        embed_scale=dim**0.5,
        activation="gelu_tanh",
        tied_head="output.weight" not in tensors,
    )
    return checked(config, "The GGUF file")


def _pattern_kinds(pattern: int, num_layers: int) -> tuple[LayerKind, ...]:
    return tuple("sliding" if (i + 1) % pattern else "full" for i in range(num_layers))


def _layer_kinds(keys: Keys, num_layers: int) -> tuple[LayerKind, ...]:
    types = keys.raw("layer_types")
    if types is None:
        return _pattern_kinds(keys.size("sliding_window_pattern", PATTERN), num_layers)
    kinds: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}
    if not isinstance(types, list) or not all(isinstance(t, str) and t in kinds for t in types):
        raise keys.bad("layer_types", "a list of full_attention and sliding_attention")
    return tuple(kinds[t] for t in types)


def _rope_from_hf(keys: Keys, head_dim: int) -> dict[LayerKind, RopeConfig]:
    """transformers 5 keeps parameters by layer type; before, scaling was of full layers only."""
    context = keys.size("max_position_embeddings")
    full_base = keys.number("rope_theta", FULL_BASE, smallest=1)
    sliding_base = keys.number("rope_local_base_freq", SLIDING_BASE, smallest=1)
    nested = keys.part("rope_parameters")
    full = (
        nested.part("full_attention") if keys.has("rope_parameters") else keys.part("rope_scaling")
    )
    sliding = nested.part("sliding_attention")
    return {
        "full": rope_from_hf(full, full_base, head_dim, context),
        "sliding": rope_from_hf(sliding, sliding_base, head_dim, context),
    }
