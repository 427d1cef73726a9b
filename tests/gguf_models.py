"""GGUF files of models in transformers, as llama.cpp's converter makes them: names by the tables of the
gguf package, the keys that say sizes, and what some architectures store otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = Iterator[tuple[str, np.ndarray]]

_ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
_INTERLEAVED = {"llama"}
"""Those whose q and k are turned from half-split rotary pairs to pairs (2i, 2i + 1)."""


def write_model(
    reference: Any, arch: str, path: Path, state: dict[str, np.ndarray] | None = None
) -> Path:
    """state: where the weights are published otherwise than transformers has them. Raises KeyError for
    a weight that the architecture has no name for."""
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
        writer.add_tensor(stored + dot + kind, np.ascontiguousarray(values))
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
    writer.add_feed_forward_length(4 * config.hidden_size if gpt2 else config.intermediate_size)
    writer.add_head_count(heads)
    shared = config.model_type not in ("gpt2", "gpt_neox")
    writer.add_head_count_kv(config.num_key_value_heads if shared else heads)
    writer.add_key_length(_head_dim(config))
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


def _olmo2(writer: gguf.GGUFWriter, config: Any) -> None:
    if hasattr(config, "sliding_window"):
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


_EXTRA_KEYS = {
    "glm4moe": _glm4moe,
    "olmo2": _olmo2,
    "gemma2": _gemma2,
    "gemma3": lambda writer, config: writer.add_sliding_window(config.sliding_window),
    "gptneox": lambda writer, config: writer.add_parallel_residual(config.use_parallel_residual),
    "qwen2moe": lambda writer, config: writer.add_expert_shared_feed_forward_length(
        config.shared_expert_intermediate_size
    ),
}


def _tensors(config: Any, state: dict[str, np.ndarray], arch: str) -> Tensors:
    """Under the names that the gguf package knows."""
    for name, values in state.items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                yield name.replace("gate_up", part), half
            continue
        if arch in _INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            halves = values.reshape(-1, 2, _head_dim(config) // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if arch == "gpt2" and ".h." in name and values.ndim > 1:
            values = values.T
        if arch == "gptneox" and "query_key_value" in name:
            by_head = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
            values = by_head.swapaxes(0, 1).reshape(values.shape)
        if name == "model.layers.0.mlp.shared_expert_gate.weight":
            values = values[0]  # some files hold a vector, some a matrix of one row
        yield name, values
