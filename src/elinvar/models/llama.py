"""Llama (Touvron et al., 2023) and its many relatives with the same blocks: SmolLM2 is one.

Pre-norm with RMSNorm, grouped-query attention with rotary positions, SwiGLU.

Legend: T tokens of this step, D model dim, P positions, L rows that need logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, LayerKind, ModelConfig
from elinvar.models.keys import (
    MAX_LAYERS,
    Keys,
    checked,
    head_dim_of,
    rope_from_gguf,
    rope_from_hf,
    vocab_size_from_gguf,
)
from elinvar.nn.attention import Attention, kv_specs
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.rope import MAX_POSITIONS, RopeTable
from elinvar.ops.api import F32, KVLayer, Ops
from elinvar.weights.rules import Rule, UnpermuteRows
from elinvar.weights.tensor import HostTensor


class Llama:
    """forward(): token ids to logits. Weights are bound once, context is an argument."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> None:
        self.config = config
        self.ops = ops
        self.rope = RopeTable(config.rope["full"])
        self.embed = weights["embed"]
        self.head = (weights["embed" if config.tied_head else "head"],)
        self.layers = [LlamaLayer(config, i, weights, ops) for i in range(config.num_layers)]
        # Gains of the norms that follow each layer: the next layer's first one, then the last.
        self.gains = [layer.attn_norm for layer in self.layers] + [weights["norm"]]

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        return kv_specs(self.config, kv_dtype)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> F32:
        """Computes the batch's tokens, writes their keys and values to `kv` (one a layer), and
        returns the logits [L, V] of `batch.logit_rows`."""
        ops, eps = self.ops, self.config.norm_eps
        rope_PD = self.rope.upto(batch.num_positions)
        x_TD = ops.embed(batch.input_ids, self.embed, 1.0)
        h_TD = ops.rms_norm(x_TD, self.gains[0], eps)
        for layer, kv_layer, next_gain in zip(self.layers, kv, self.gains[1:], strict=True):
            a_TD = layer.attention(h_TD, rope_PD, batch, kv_layer)
            if layer is self.layers[-1]:  # nothing after it looks at other tokens
                x_TD, a_TD = batch.where_logits(x_TD), batch.where_logits(a_TD)
            x_TD, h_TD = ops.add_rms_norm(x_TD, a_TD, layer.mlp_norm, eps)
            m_TD = layer.mlp(h_TD)
            x_TD, h_TD = ops.add_rms_norm(x_TD, m_TD, next_gain, eps)
        return ops.linear(h_TD, self.head)


class LlamaLayer:
    def __init__(self, config: ModelConfig, i: int, weights: Mapping[str, Any], ops: Ops) -> None:
        w = {name: weights[f"layers.{i}.{name}"] for name in LAYER}
        self.attn_norm, self.mlp_norm = w["attn_norm"], w["mlp_norm"]
        self.attention = Attention(config, i, (w["q"], w["k"], w["v"]), w["o"], ops)
        self.mlp = GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)


FULL: tuple[LayerKind, ...] = ("full",)
LAYER = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")


def rules(config: ModelConfig) -> list[Rule]:
    """Where each weight lies. llama.cpp's converter interleaves the rotary pairs of q and k."""
    d, f, v = config.dim, config.ff_dim, config.vocab_size
    nq, nk = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q_fix, k_fix = UnpermuteRows(config.num_heads), UnpermuteRows(config.num_kv_heads)
    hf, gguf = "model.layers.{i}.", "blk.{i}."
    attn, mlp = hf + "self_attn.", hf + "mlp."
    to = "layers.{i}."
    table = [
        Rule("embed", "model.embed_tokens.weight", "token_embd.weight", (v, d)),
        Rule(to + "attn_norm", hf + "input_layernorm.weight", gguf + "attn_norm.weight", (d,)),
        Rule(to + "q", attn + "q_proj.weight", gguf + "attn_q.weight", (nq, d), gguf_fix=q_fix),
        Rule(to + "k", attn + "k_proj.weight", gguf + "attn_k.weight", (nk, d), gguf_fix=k_fix),
        Rule(to + "v", attn + "v_proj.weight", gguf + "attn_v.weight", (nk, d)),
        Rule(to + "o", attn + "o_proj.weight", gguf + "attn_output.weight", (d, nq)),
        Rule(
            to + "mlp_norm", hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight", (d,)
        ),
        Rule(to + "gate", mlp + "gate_proj.weight", gguf + "ffn_gate.weight", (f, d)),
        Rule(to + "up", mlp + "up_proj.weight", gguf + "ffn_up.weight", (f, d)),
        Rule(to + "down", mlp + "down_proj.weight", gguf + "ffn_down.weight", (d, f)),
        Rule("norm", "model.norm.weight", "output_norm.weight", (d,)),
    ]
    if not config.tied_head:
        table.append(Rule("head", "lm_head.weight", "output.weight", (v, d)))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    dim, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head_dim = head_dim_of(keys, "head_dim", dim, heads)
    num_layers = keys.size("num_hidden_layers", largest=MAX_LAYERS)
    max_context = keys.size("max_position_embeddings")
    rope = rope_from_hf(
        keys.part("rope_parameters" if keys.has("rope_parameters") else "rope_scaling"),
        keys.number("rope_theta", 10_000.0, smallest=1),
        head_dim,
        max_context,
    )
    config = ModelConfig(
        family="llama",
        vocab_size=keys.size("vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=head_dim,
        ff_dim=keys.size("intermediate_size"),
        max_context=min(max_context, MAX_POSITIONS),
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * num_layers,
        rope={"full": rope},
        attn_scale=head_dim**-0.5,
        tied_head=keys.flag("tie_word_embeddings", False),
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys, and from which tensors it holds: no output.weight is a tied head,
    rope_freqs.weight holds divisors of the rotary frequencies (Llama 3.1)."""
    keys = Keys(metadata, "The GGUF file", "llama.")
    keys.only("expert_count", 0)
    dim, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = head_dim_of(keys, "attention.key_length", dim, heads)
    num_layers = keys.size("block_count", largest=MAX_LAYERS)
    keys.only("rope.dimension_count", head_dim)
    max_context = keys.size("context_length")
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size_from_gguf(keys, tensors),
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        ff_dim=keys.size("feed_forward_length"),
        max_context=min(max_context, MAX_POSITIONS),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * num_layers,
        rope={"full": rope_from_gguf(keys, tensors, head_dim, max_context)},
        attn_scale=head_dim**-0.5,
        tied_head="output.weight" not in tensors,
    )
    return checked(config, "The GGUF file")
