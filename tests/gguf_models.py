"""GGUF files of models in transformers, as llama.cpp's converter makes them: names by the tables of the
gguf package, the keys that say sizes, and what some architectures store otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np

Tensors = Iterator[tuple[str, np.ndarray]]

_ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
_INTERLEAVED = {"llama", "granite", "minicpm", "internlm2", "smollm3", "granitemoe", "mistral3"}
"""Those whose q and k are turned from half-split rotary pairs to pairs (2i, 2i + 1)."""
_TURNED = {"gpt-oss", "llama4"}
"""Those whose experts transformers holds as (in, out)."""


def write_model(
    reference: Any,
    arch: str,
    path: Path,
    state: dict[str, np.ndarray] | None = None,
    experts: str = "F32",
) -> Path:
    """state: where the weights are published otherwise than transformers has them; experts: type of
    their matrices. Raises KeyError for a weight that the architecture has no name for."""
    config = reference.config
    state = state or {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    writer = gguf.GGUFWriter(path, arch)
    _add_sizes(writer, config)
    _add_rope(writer, reference)
    _add_experts(writer, config)
    if arch in _EXTRA_KEYS:
        _EXTRA_KEYS[arch](writer, config)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[arch], config.num_hidden_layers)
    for name, values in _tensors(config, state, arch):
        stem, dot, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = name, ".", "weight"
        stored = names.get_name(stem)
        if stored is None:
            raise KeyError(f"{arch} files have no {name}")
        dtype = gguf.GGMLQuantizationType[experts if values.ndim > 2 else "F32"]
        raw = gguf.quants.quantize(np.ascontiguousarray(values), dtype)
        writer.add_tensor(stored + dot + kind, raw, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers + getattr(config, "num_mtp_layers", 0))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    # The tests give every configuration all sizes, of which these models do not use some.
    gpt2 = config.model_type == "gpt2"
    ff_dim = getattr(config, "intermediate_size_mlp", config.intermediate_size)
    writer.add_feed_forward_length(4 * config.hidden_size if gpt2 else ff_dim)
    writer.add_head_count(heads)
    shared = config.model_type not in ("gpt2", "gpt_neox")
    writer.add_head_count_kv(config.num_key_value_heads if shared else heads)
    writer.add_key_length(getattr(config, "qk_head_dim", None) or _head_dim(config))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        eps = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
        writer.add_layer_norm_eps(next(getattr(config, e) for e in eps if hasattr(config, e)))


def _head_dim(config: Any) -> int:
    default = config.hidden_size // config.num_attention_heads
    return getattr(config, "head_dim", None) or default


def _add_rope(writer: gguf.GGUFWriter, reference: Any) -> None:
    """Llama 3.1's scaling becomes divisors of the frequencies."""
    config = reference.config
    params = getattr(config, "rope_parameters", None)
    if params is None:
        return
    params = params.get("full_attention", params)
    theta, head_dim = params["rope_theta"], _head_dim(config)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(int(head_dim * params.get("partial_rotary_factor", 1.0)))
    if params["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(params["factor"])
        writer.add_rope_scaling_orig_ctx_len(params["original_max_position_embeddings"])
    if params["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(reference.model.rotary_emb.attention_scaling)
        for length in ("long", "short"):
            factors = np.array(params[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if params["rope_type"] == "llama3":
        plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        divisors = plain / reference.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", np.maximum(divisors, 1).astype(np.float32))


def _add_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((getattr(config, key) for key in keys if hasattr(config, key)), None)
    if count is None:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _windows(writer: gguf.GGUFWriter, config: Any) -> None:
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])


def _glm4moe(writer: gguf.GGUFWriter, config: Any) -> None:
    """As a file whose last block, not written here, predicts further tokens."""
    writer.add_nextn_predict_layers(1)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)
    if "beta_fast" in config.rope_parameters:
        writer.add_rope_scaling_yarn_beta_fast(config.rope_parameters["beta_fast"])


def _llama4(writer: gguf.GGUFWriter, config: Any) -> None:
    """feed_forward_length is that of layers without experts."""
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)


def _mistral3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])
    writer.add_rope_scaling_yarn_log_mul(config.rope_parameters["mscale_all_dim"])


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _cohere2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _minimax_m2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _ernie_moe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_leading_dense_block_count(config.moe_layer_start_index)
    writer.add_interleave_moe_layer_step(config.moe_layer_interval)
    writer.add_expert_shared_count(config.moe_num_shared_experts)


def _minicpm3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)


def _gemma3n(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_altup_num_inputs(config.altup_num_inputs)
    writer.add_altup_active_idx(config.altup_active_idx)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    shares = config.activation_sparsity_pattern
    writer.add_activation_sparsity_scale(
        [NormalDist().inv_cdf(p) if p else -math.inf for p in shares]
    )


_EXTRA_KEYS = {
    "minicpm3": _minicpm3,
    "gemma3n": _gemma3n,
    "mistral3": _mistral3,
    "gpt-oss": _gpt_oss,
    "llama4": _llama4,
    "ernie4_5-moe": _ernie_moe,
    "stablelm": lambda writer, config: writer.add_parallel_residual(True),
    "minimax-m2": _minimax_m2,
    "granitemoe": _granite,
    "exaone4": _windows,
    "command-r": lambda writer, config: writer.add_logit_scale(config.logit_scale),
    "cohere2": _cohere2,
    "phi3": lambda writer, config: writer.add_sliding_window(config.sliding_window or 0),
    "granite": _granite,
    "minicpm": _granite,
    "glm4moe": _glm4moe,
    "olmo2": _windows,
    "gemma2": _gemma2,
    "gemma3": lambda writer, config: writer.add_sliding_window(config.sliding_window),
    "gptneox": lambda writer, config: writer.add_parallel_residual(config.use_parallel_residual),
    "qwen2moe": lambda writer, config: writer.add_expert_shared_feed_forward_length(
        config.shared_expert_intermediate_size
    ),
}


_RENAMED = {
    "gate.moe_statics.e_score": "moe_statics.e_score",
    "e_score_correction_bias": "e_score_correction.bias",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.experts.": "mlp.experts.",
}
"""What the gguf package knows only by the names of checkpoints."""


def _tensors(config: Any, state: dict[str, np.ndarray], arch: str) -> Tensors:
    """Under the names that the gguf package knows."""
    for name, values in state.items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch in _TURNED and "experts." in name and values.ndim > 2:
            values = values.swapaxes(1, 2)
        if "experts." in name:
            name = name.replace("_bias", ".bias")
        if "experts.gate_up_proj" in name:
            gate, up = (
                (values[:, ::2], values[:, 1::2])
                if arch == "gpt-oss"
                else np.split(values, 2, axis=1)
            )
            yield name.replace("gate_up", "gate"), gate
            yield name.replace("gate_up", "up"), up
            continue
        if arch in _INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            halves = values.reshape(-1, 2, _head_dim(config) // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if arch == "gemma3n" and ".altup_" in name:
            if name.endswith(".0.weight"):  # all of them are one stack
                stem = name.removesuffix(".0.weight")
                others = range(config.altup_num_inputs - 1)
                yield f"{stem}.weight", np.stack([state[f"{stem}.{i}.weight"] for i in others])
            continue
        if arch in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if arch == "gpt2" and ".h." in name and values.ndim > 1:
            values = values.T
        if arch == "gptneox" and "query_key_value" in name:
            by_head = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
            values = by_head.swapaxes(0, 1).reshape(values.shape)
        if name == "model.layers.0.mlp.shared_expert_gate.weight":
            values = values[0]  # some files hold a vector, some a matrix of one row
        yield name, values
