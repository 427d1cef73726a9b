"""What families have in common: the names that most checkpoints give sizes and weights.

Keys of config.json and of GGUF files become the fields of ModelConfig that mean the same everywhere;
a family adds its own. Rules name the parts of a layer, as Llama and those after it do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from elinvar.base.config import Activation, LayerKind, ModelConfig, RopeConfig
from elinvar.models.keys import (
    MAX_LAYERS,
    Keys,
    head_dim_of,
    rope_from_gguf,
    rope_from_hf,
    vocab_size_from_gguf,
)
from elinvar.nn.rope import MAX_POSITIONS
from elinvar.weights.fixes import Fix
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

FULL: tuple[LayerKind, ...] = ("full",)
NO_ROPE = RopeConfig(1.0, 0)
"""Of models whose positions are learned."""
_LAYER_TYPES: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}

HF, GGUF, TO = "model.layers.{i}.", "blk.{i}.", "layers.{i}."
"""Before the names of a layer's weights: in checkpoints, in GGUF files, here."""


def sizes_from_hf(keys: Keys, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """Fields of ModelConfig that config.json files name alike. head_dim: where the file gives none;
    otherwise the model dim over the heads. tied: where it does not say."""
    dim, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if head_dim is None:
        head_dim = head_dim_of(keys, "head_dim", dim, heads)
    else:
        head_dim = keys.size("head_dim", head_dim)
    return {
        "vocab_size": keys.size("vocab_size"),
        "dim": dim,
        "num_layers": keys.size("num_hidden_layers", largest=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": keys.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "ff_dim": keys.size("intermediate_size"),
        "max_context": min(keys.size("max_position_embeddings"), MAX_POSITIONS),
        "attn_scale": head_dim**-0.5,
        "tied_head": keys.flag("tie_word_embeddings", tied),
    }


def sizes_from_gguf(
    keys: Keys, tensors: Mapping[str, HostTensor], head_dim: int | None = None
) -> dict[str, Any]:
    """The same from a GGUF file; without output.weight the head is tied."""
    dim, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if head_dim is None:
        head_dim = head_dim_of(keys, "attention.key_length", dim, heads)
    else:
        head_dim = keys.size("attention.key_length", head_dim)
    return {
        "vocab_size": vocab_size_from_gguf(keys, tensors),
        "dim": dim,
        "num_layers": keys.size("block_count", largest=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ff_dim": keys.size("feed_forward_length"),
        "max_context": min(keys.size("context_length"), MAX_POSITIONS),
        "attn_scale": head_dim**-0.5,
        "tied_head": "output.weight" not in tensors,
    }


def one_rope_from_hf(
    keys: Keys, head_dim: int, base: float = 10_000.0, partial: float | None = None
) -> RopeConfig:
    """The rotary embedding of a model whose layers have one. base, and for families that may rotate
    a part of each head, partial: where the file gives none."""
    original = "original_max_position_embeddings"
    if partial is None:
        keys.only("partial_rotary_factor", 1.0)
    else:
        partial = keys.number("partial_rotary_factor", partial, smallest=0)
    return rope_from_hf(
        keys.part("rope_parameters" if keys.has("rope_parameters") else "rope_scaling"),
        keys.number("rope_theta", base, smallest=1),
        head_dim,
        keys.size("max_position_embeddings"),
        partial,
        keys.size(original) if keys.has(original) else None,
    )


def ropes_from_hf(
    keys: Keys, head_dim: int, base: float, sliding_base: float | None = None
) -> dict[LayerKind, RopeConfig]:
    """Of full and of sliding layers. transformers 5 keeps parameters by layer type; before, scaling
    was of full layers only. Bases where the file gives none; sliding layers have the full ones' unless
    `sliding_base` says otherwise."""
    context = keys.size("max_position_embeddings")
    params = keys.part("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    full = params.part("full_attention") if params.has("full_attention") else params
    base = keys.number("rope_theta", base, smallest=1)
    full_rope = rope_from_hf(full, base, head_dim, context)
    sliding = params.part("sliding_attention")
    sliding_base = sliding_base or full_rope.base
    return {"full": full_rope, "sliding": rope_from_hf(sliding, sliding_base, head_dim, context)}


def one_rope_from_gguf(
    keys: Keys, tensors: Mapping[str, HostTensor], head_dim: int, base: float = 10_000.0
) -> RopeConfig:
    return rope_from_gguf(keys, tensors, head_dim, keys.size("context_length"), base)


def kinds_from_hf(
    keys: Keys, default: Sequence[LayerKind], known: Mapping[str, LayerKind] = _LAYER_TYPES
) -> tuple[LayerKind, ...]:
    """One a layer, from `layer_types`, of those `known`; `default` where the file does not have it."""
    types = keys.raw("layer_types")
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or not all(isinstance(t, str) and t in known for t in types):
        raise keys.bad("layer_types", f"a list of {' and '.join(known)}")
    return tuple(known[t] for t in types)


def kinds_from_gguf(keys: Keys, num_layers: int, nth: int) -> tuple[LayerKind, ...]:
    """The pattern is a flag a layer, or how often a full one comes; `nth` where there is none."""
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        return tuple("sliding" if flag else "full" for flag in pattern)
    return every_nth_full(keys.size("attention.sliding_window_pattern", nth), num_layers)


def every_nth_full(n: int, num_layers: int) -> tuple[LayerKind, ...]:
    """Sliding layers, but for every n-th."""
    return tuple("sliding" if (i + 1) % n else "full" for i in range(num_layers))


def outer_rules(config: ModelConfig, norm_fix: Fix | None = None) -> list[Rule]:
    """Embedding, last norm, head. norm_fix: of gains in Hugging Face checkpoints."""
    d, v = config.dim, config.vocab_size
    rules = [
        Rule("embed", "model.embed_tokens.weight", "token_embd.weight", (v, d)),
        Rule("norm", "model.norm.weight", "output_norm.weight", (d,), hf_fix=norm_fix),
    ]
    if not config.tied_head:
        rules.append(Rule("head", "lm_head.weight", "output.weight", (v, d)))
    return rules


def norm_rules(
    names: Mapping[str, tuple[str, str]], size: int, fix: Fix | None = None
) -> list[Rule]:
    """A layer's gains of one size: canonical name -> (in checkpoints, in GGUF files), of which both
    leave out ".weight"."""
    return [
        Rule(TO + name, f"{HF}{hf}.weight", f"{GGUF}{gguf}.weight", (size,), hf_fix=fix)
        for name, (hf, gguf) in names.items()
    ]


def attention_rules(
    config: ModelConfig, gguf_q_fix: Fix | None = None, gguf_k_fix: Fix | None = None
) -> list[Rule]:
    d, attn = config.dim, HF + "self_attn."
    nq, nk = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        Rule(
            TO + "q", attn + "q_proj.weight", GGUF + "attn_q.weight", (nq, d), gguf_fix=gguf_q_fix
        ),
        Rule(
            TO + "k", attn + "k_proj.weight", GGUF + "attn_k.weight", (nk, d), gguf_fix=gguf_k_fix
        ),
        Rule(TO + "v", attn + "v_proj.weight", GGUF + "attn_v.weight", (nk, d)),
        Rule(TO + "o", attn + "o_proj.weight", GGUF + "attn_output.weight", (d, nq)),
    ]


def bias_rules(
    config: ModelConfig,
    fixes: Mapping[str, Fix] | None = None,
    gguf_fixes: Mapping[str, Fix] | None = None,
    optional: bool = False,
) -> list[Rule]:
    """Biases of q, k and v; fixes by name, of checkpoints and of GGUF files."""
    n = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    return [
        Rule(
            f"{TO}{name}_bias",
            f"{HF}self_attn.{name}_proj.bias",
            f"{GGUF}attn_{name}.bias",
            (heads * config.head_dim,),
            hf_fix=(fixes or {}).get(name),
            gguf_fix=(gguf_fixes or {}).get(name),
            optional=optional,
        )
        for name, heads in n.items()
    ]


def qkv_bias(w: Mapping[str, Any]) -> list[Any] | None:
    """Those of a layer, if it has them."""
    return [w[f"{name}_bias"] for name in "qkv"] if "q_bias" in w else None


def mlp_rules(config: ModelConfig, block: str = "mlp") -> list[Rule]:
    d, f, mlp = config.dim, config.ff_dim, f"{HF}{block}."
    return [
        Rule(TO + "gate", mlp + "gate_proj.weight", GGUF + "ffn_gate.weight", (f, d)),
        Rule(TO + "up", mlp + "up_proj.weight", GGUF + "ffn_up.weight", (f, d)),
        Rule(TO + "down", mlp + "down_proj.weight", GGUF + "ffn_down.weight", (d, f)),
    ]


def by_layer(
    weights: Mapping[str, Any], num_layers: int, prefix: str = "layers."
) -> list[dict[str, Any]]:
    """Each layer's weights, by the rest of their names."""
    layers: list[dict[str, Any]] = [{} for _ in range(num_layers)]
    for name, weight in weights.items():
        if name.startswith(prefix):
            _, i, rest = name.split(".", 2)
            layers[int(i)][rest] = weight
    return layers


def with_bias(
    name: str,
    hf: str,
    gguf: str,
    shape: tuple[int, ...],
    transposed: bool = False,
    hf_part: Part | None = None,
    gguf_part: Part | None = None,
) -> list[Rule]:
    """A matrix or a gain, and the bias beside it if there is one. Parts count rows: their wholes have
    one dim."""

    def rule(suffix: str, kind: str, of: tuple[int, ...]) -> Rule:
        parts = [p and replace(p, of=(*p.of, *of[1:])) for p in (hf_part, gguf_part)]
        names = name + suffix, f"{hf}.{kind}", f"{gguf}.{kind}"
        return Rule(
            *names,
            of,
            optional=kind == "bias",
            hf_part=parts[0],
            gguf_part=parts[1],
            hf_transposed=transposed and len(of) > 1,
        )

    return [rule("", "weight", shape), rule("_bias", "bias", shape[:1])]


_ACTIVATIONS: dict[str, Activation] = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "relu2"},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}


def activation_from_hf(keys: Keys, key: str, default: str) -> Activation:
    name = keys.raw(key) if keys.has(key) else default
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise keys.bad(key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
