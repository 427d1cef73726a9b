"""Gemma 3n, text only (Gemma Team, 2025): Gemma 3's attention in the frame of nn/streams.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from elinvar.base.config import ModelConfig, RopeConfig, StreamsConfig
from elinvar.base.errors import ModelError
from elinvar.models.family import Family
from elinvar.models.gemma3 import FULL_BASE, HEAD_DIM, NORMS, SLIDING_BASE
from elinvar.models.keys import Keys, checked
from elinvar.models.qwen3 import HEAD_NORMS
from elinvar.models.shared import (
    GGUF,
    HF,
    TO,
    attention_rules,
    by_layer,
    every_nth_full,
    kinds_from_hf,
    mlp_rules,
    norm_rules,
    outer_rules,
    ropes_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.norm import RMSNorm
from elinvar.nn.streams import StreamDecoder, StreamLayer
from elinvar.ops.api import Ops
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

PATTERN, MAX_STREAMS, SPARSE_LAYERS, SPARSITY = 5, 8, 10, 0.95
LAYER_NORMS = {
    "router_norm": ("altup.router_norm", "altup_router_norm"),
    "laurel_norm": ("laurel.post_laurel_norm", "laurel_post_norm"),
    "own_norm": ("post_per_layer_input_norm", "post_norm"),
}


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> StreamDecoder:
    each = enumerate(by_layer(weights, config.num_layers))
    layers = [StreamLayer(config, i, w, ops) for i, w in each]
    return StreamDecoder(
        config, weights, ops, layers, RMSNorm(weights["norm"], config.norm_eps, ops)
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Factors of streams are vectors here: too small to be matrices of codes."""
    assert config.streams is not None
    c, d, s = config.streams, config.dim, config.streams.num_streams
    all_own = config.num_layers * c.own_dim
    with_keys = range(c.kv_layers)
    gains = norm_rules(HEAD_NORMS, config.head_dim)
    attention = [
        replace(rule, layers=with_keys) if rule.name[-1] in "kv" or "k_norm" in rule.name else rule
        for rule in [*attention_rules(config), *gains]
    ]

    def of_layer(name: str, hf: str, gguf: str, shape: tuple[int, ...]) -> Rule:
        return Rule(TO + name, f"{HF}{hf}.weight", f"{GGUF}{gguf}.weight", shape)

    def factors(name: str, hf: str, gguf: str, n: int) -> Rule:
        whole = Part((n, s))
        return replace(of_layer(name, hf, gguf, (n * s,)), hf_part=whole, gguf_part=whole)

    def outer(name: str, hf: str, gguf: str, shape: tuple[int, ...]) -> Rule:
        return Rule(name, f"model.{hf}.weight", f"{gguf}.weight", shape)

    scale = (
        TO + "altup_scale",
        HF + "altup.correct_output_scale",
        GGUF + "altup_correct_scale.weight",
    )
    table = [
        *norm_rules(NORMS | LAYER_NORMS, d),
        *attention,
        *mlp_rules(config),
        of_layer("altup_router", "altup.modality_router", "altup_router", (s, d)),
        factors("altup_predict", "altup.prediction_coefs", "altup_predict_coef", s * s),
        factors("altup_correct", "altup.correction_coefs", "altup_correct_coef", s),
        Rule(*scale, (d,)),
        of_layer("laurel_left", "laurel.linear_left", "laurel_l", (c.rank, d)),
        of_layer("laurel_right", "laurel.linear_right", "laurel_r", (d, c.rank)),
        of_layer("own_gate", "per_layer_input_gate", "inp_gate", (c.own_dim, d)),
        of_layer("own_out", "per_layer_projection", "proj", (d, c.own_dim)),
        outer(
            "own_embed", "embed_tokens_per_layer", "per_layer_token_embd", (c.own_vocab, all_own)
        ),
        outer("own_project", "per_layer_model_projection", "per_layer_model_proj", (all_own, d)),
        outer("own_project_norm", "per_layer_projection_norm", "per_layer_proj_norm", (c.own_dim,)),
        *outer_rules(config),
    ]
    for i in range(1, s):
        for name, hf, gguf in (
            ("spread", "altup_projections", "altup_proj"),
            ("gather", "altup_unembed_projections", "altup_unembd_proj"),
        ):
            rule = outer(f"altup.{i}.{name}", f"{hf}.{i - 1}", gguf, (d, d))
            table.append(replace(rule, gguf_part=Part((s - 1, d, d), (i - 1) * d)))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(_with_one(metadata, "intermediate_size"), "config.json")
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("altup_active_idx", 0)
    sizes = sizes_from_hf(keys, HEAD_DIM, tied=True)
    num_layers = sizes["num_layers"]
    sizes["attn_scale"] = 1.0
    kinds = kinds_from_hf(keys, every_nth_full(PATTERN, num_layers))
    sliding_base = keys.number("rope_local_base_freq", SLIDING_BASE, smallest=1)
    config = ModelConfig(
        family="gemma3n",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=ropes_from_hf(keys, sizes["head_dim"], FULL_BASE, sliding_base),
        window=keys.size("sliding_window"),
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        final_softcap=keys.number("final_logit_softcapping", 30.0),
        streams=StreamsConfig(
            num_streams=keys.size("altup_num_inputs", 4, largest=MAX_STREAMS),
            rank=keys.size("laurel_rank"),
            own_dim=keys.size("hidden_size_per_layer_input"),
            own_vocab=keys.size("vocab_size_per_layer_input"),
            kv_layers=_kv_layers(keys, "num_kv_shared_layers", kinds),
            deviations=_deviations(keys, num_layers),
            scaled=keys.flag("altup_correct_scale", True),
        ),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    metadata = _with_one(metadata, "gemma3n.feed_forward_length")
    keys = Keys(metadata, "The GGUF file", "gemma3n.")
    keys.only("altup.active_idx", 0)
    sizes = sizes_from_gguf(keys, tensors, HEAD_DIM)
    num_layers, head_dim = sizes["num_layers"], sizes["head_dim"]
    sizes["attn_scale"] = 1.0
    kinds = every_nth_full(PATTERN, num_layers)
    full_base = keys.number("rope.freq_base", FULL_BASE, smallest=1)
    sliding_base = keys.number("rope.freq_base_swa", SLIDING_BASE, smallest=1)
    own, low = (
        tensors.get(name) for name in ("per_layer_token_embd.weight", "blk.0.laurel_l.weight")
    )
    if own is None or low is None:
        raise ModelError("The GGUF file lacks the embeddings of each layer; it is not complete.")
    config = ModelConfig(
        family="gemma3n",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=kinds,
        rope={
            "full": RopeConfig(full_base, head_dim),
            "sliding": RopeConfig(sliding_base, head_dim),
        },
        window=keys.size("attention.sliding_window"),
        embed_scale=sizes["dim"] ** 0.5,
        activation="gelu_tanh",
        final_softcap=keys.number("final_logit_softcapping", 30.0),
        streams=StreamsConfig(
            num_streams=keys.size("altup.num_inputs", 4, largest=MAX_STREAMS),
            rank=low.shape[0],
            own_dim=keys.size("embedding_length_per_layer_input"),
            own_vocab=own.shape[0],
            kv_layers=_kv_layers(keys, "attention.shared_kv_layers", kinds),
            deviations=_deviations_of_gguf(keys, num_layers),
            scaled=True,
        ),
        **sizes,
    )
    return checked(config, "The GGUF file")


def _deviations_of_gguf(keys: Keys, num_layers: int) -> tuple[float | None, ...]:
    """-inf where all activations go through."""
    found = keys.raw("activation_sparsity_scale")
    if not isinstance(found, np.ndarray) or len(found) != num_layers or np.isnan(found).any():
        raise keys.bad("activation_sparsity_scale", f"{num_layers} numbers")
    return tuple(float(x) if x > -np.inf else None for x in found)


def _with_one(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """One number where files have a list, one a layer, of the same one."""
    found = metadata.get(key)
    sizes = found.tolist() if isinstance(found, np.ndarray) else found
    if isinstance(sizes, list) and sizes and all(size == sizes[0] for size in sizes):
        return {**metadata, key: sizes[0]}
    return metadata


def _kv_layers(keys: Keys, key: str, kinds: tuple[str, ...]) -> int:
    shared = keys.raw(key)
    shared = 15 if shared is None else shared
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < len(kinds):
        raise keys.bad(key, f"a whole number from 0 to {len(kinds) - 1}")
    own = len(kinds) - shared
    if set(kinds) != set(kinds[:own]):
        raise keys.bad(key, "such that every type of layer has keys somewhere")
    return own


def _deviations(keys: Keys, num_layers: int) -> tuple[float | None, ...]:
    """Of what share of a normal distribution is below: so far from the mean activations begin."""
    pattern = keys.raw("activation_sparsity_pattern")
    if pattern is None:
        sparse = SPARSE_LAYERS if num_layers > SPARSE_LAYERS else 0
        pattern = [SPARSITY] * sparse + [0.0] * (num_layers - sparse)
    shares = [pattern] * num_layers if isinstance(pattern, int | float) else pattern
    good = isinstance(shares, list) and len(shares) == num_layers
    if not good or not all(isinstance(p, int | float) and 0 <= p < 1 for p in shares):
        raise keys.bad("activation_sparsity_pattern", f"{num_layers} numbers from 0 to below 1")
    from statistics import NormalDist  # brings OpenSSL: not for every start

    return tuple(NormalDist().inv_cdf(p) if p > 0 else None for p in shares)


FAMILIES = (
    Family(
        name="gemma3n",
        models="Gemma 3n E2B, E4B, text",
        hf_architectures=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        gguf_architectures=("gemma3n",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
