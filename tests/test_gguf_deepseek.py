"""GGUF files of DeepSeek V2 and V3, as llama.cpp's converter makes them of models in transformers:
newer ones with W_uk and W_uv apart, the first one turned, and older ones with kv_b whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.models.load import load_model
from elinvar.models.registry import read_config
from elinvar.ops import load_provider
from elinvar.weights.checkpoint import open_checkpoint
from families import CASES
from helpers import assert_parity, run_tokens
from test_models_tiny import load_f32, make_reference, prompt, reference_logits

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    "mlp.gate": "ffn_gate_inp",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}

ARCHITECTURES = {"deepseek_v32": "deepseek32", "glm_moe_dsa": "glm-dsa"}
"""Of sparse attention, by transformers' model type."""


def write_gguf(
    reference: Any, path: Path, old: bool, kind: str = "f32", without: str = "", **keys: int
) -> Path:
    """old: as before 2025. kind: what Q8_0 can hold is "q8", or "q8 as f32". keys: more of them."""
    c = reference.config
    arch = ARCHITECTURES.get(c.model_type, "deepseek2")
    writer = gguf.GGUFWriter(path, arch)
    _add_keys(writer, c, old)
    for key, value in keys.items():
        writer.add_uint32(f"{arch}.{key}", value)
    tensors: dict[str, np.ndarray] = {}
    for name, values in reference.state_dict().items():
        _add_tensor(tensors, name, values.numpy(), c, old)
    if c.tie_word_embeddings:
        tensors.pop("output.weight", None)
    for name, values in tensors.items():
        if without and without in name:
            continue
        values, raw_dtype = np.ascontiguousarray(values), None
        if kind != "f32" and values.ndim > 1 and values.shape[-1] % 32 == 0:
            raw_dtype = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, raw_dtype)
            if kind == "q8 as f32":
                values, raw_dtype = gguf.quants.dequantize(values, raw_dtype), None
        writer.add_tensor(name, values, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_keys(writer: Any, c: Any, old: bool) -> None:
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_head_count(c.num_attention_heads)
    head, rope = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_rope_head_dim
    if old:
        writer.add_head_count_kv(c.num_attention_heads)
        writer.add_key_length(head)
        writer.add_value_length(c.v_head_dim)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(c.kv_lora_rank + rope)
        writer.add_value_length(c.kv_lora_rank)
        writer.add_key_length_mla(head)
        writer.add_value_length_mla(c.v_head_dim)
    if c.q_lora_rank is not None:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_rope_dimension_count(rope)
    _add_rope(writer, c.rope_parameters)
    writer.add_leading_dense_block_count(min(c.first_k_dense_replace, c.num_hidden_layers))
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    if c.model_type in ARCHITECTURES:
        writer.add_indexer_head_count(c.index_n_heads)
        writer.add_indexer_key_length(c.index_head_dim)
        writer.add_indexer_top_k(c.index_topk)
    v3 = c.model_type != "deepseek_v2"
    if v3:
        writer.add_expert_weights_norm(c.norm_topk_prob)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if not old:
        grouped = v3 or c.topk_method == "group_limited_greedy"
        writer.add_expert_group_count(c.n_group if grouped else 1)
        writer.add_expert_group_used_count(c.topk_group if grouped else 1)


def _add_rope(writer: Any, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _add_tensor(
    tensors: dict[str, np.ndarray], name: str, values: np.ndarray, c: Any, old: bool
) -> None:
    prefix = ""
    if name.startswith("model.layers."):
        _, _, layer, name = name.split(".", 3)
        prefix = f"blk.{layer}."
    if name == "mlp.gate.e_score_correction_bias":
        tensors[f"{prefix}exp_probs_b.bias"] = values
    elif name == "mlp.experts.gate_up_proj":
        gate, up = np.split(values, 2, axis=1)
        tensors[f"{prefix}ffn_gate_exps.weight"] = gate
        tensors[f"{prefix}ffn_up_exps.weight"] = up
    elif name == "mlp.experts.down_proj":
        tensors[f"{prefix}ffn_down_exps.weight"] = values
    elif name == "self_attn.kv_b_proj.weight" and not old:
        heads = values.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        tensors[f"{prefix}attn_k_b.weight"] = heads[:, : c.qk_nope_head_dim].swapaxes(1, 2)
        tensors[f"{prefix}attn_v_b.weight"] = heads[:, c.qk_nope_head_dim :]
    else:
        stem, _, last = name.rpartition(".")
        tensors[f"{prefix}{NAMES[stem]}.{last}"] = values


@pytest.mark.parametrize("old", [False, True], ids=["k_b and v_b", "kv_b"])
@pytest.mark.parametrize("case", ["deepseek2-lite", "deepseek2", "deepseek3", "deepseek3-dense"])
def test_gguf_parity(case: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = CASES[case]
    if case == "deepseek2":  # the files know one mscale, as all published models have one
        rope = one.settings["rope_parameters"] | {"mscale": 0.707, "mscale_all_dim": 0.707}
        one = replace(one, settings=one.settings | {"rope_parameters": rope})
        monkeypatch.setitem(CASES, case, one)
    reference, ops = make_reference(case), load_provider("cpu")
    if old and "n_group" in one.settings:
        # What the files did not say is told by the number of experts of those that there were.
        sizes = reference.config.n_group, reference.config.topk_group
        known = {reference.config.n_routed_experts: sizes}
        monkeypatch.setattr("elinvar.models.deepseek_gguf._GROUPS", known)
    model = load_f32(write_gguf(reference, tmp_path / "tiny.gguf", old), ops)
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(reference, prompt()))


@pytest.mark.parametrize("case", ["deepseek32", "deepseek32-few", "glm-dsa", "glm-dsa-shared"])
def test_sparse_attention(case: str, tmp_path: Path) -> None:
    """Which layers have an index, their tensors tell."""
    reference, ops = make_reference(case), load_provider("cpu")
    path = write_gguf(reference, tmp_path / "tiny.gguf", old=False)
    model = load_f32(path, ops)
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(reference, prompt()))
    bare = write_gguf(reference, tmp_path / "bare.gguf", old=False, without="blk.0.indexer.proj")
    with pytest.raises(ModelError, match=r"lacks the tensor blk\.0\.indexer\.proj\.weight"):
        read_config(open_checkpoint(bare))


@pytest.fixture(scope="module")
def wide() -> Any:
    """A model of which Q8_0 can hold every matrix."""
    with pytest.MonkeyPatch.context() as patch:
        one = CASES["deepseek3"]
        sizes = {"qk_nope_head_dim": 32, "q_lora_rank": 32, "moe_intermediate_size": 32}
        settings = one.settings | sizes | {"intermediate_size": 96, "n_group": 1, "topk_group": 1}
        patch.setitem(CASES, "deepseek3", replace(one, settings=settings))
        return make_reference("deepseek3")


@pytest.mark.parametrize("old", [False, True], ids=["k_b and v_b", "kv_b"])
def test_quantised_blocks(wide: Any, old: bool, tmp_path: Path) -> None:
    ops = load_provider("cpu")
    logits = [
        run_tokens(load_f32(write_gguf(wide, tmp_path / kind, old, kind), ops), ops, prompt())
        for kind in ("q8", "q8 as f32")
    ]
    assert np.array_equal(*logits)
    notes: list[str] = []
    model = load_model(open_checkpoint(tmp_path / "q8"), ops, log=notes.append)
    # W_uk is turned as it lies only in the newer files.
    assert any("f32 (transposed)" in note for note in notes) == old
    # Rounded activations choose other experts for a few tokens.
    assert np.median(np.abs(run_tokens(model, ops, prompt()) - logits[0])) < 0.1


def test_what_the_file_says(wide: Any, tmp_path: Path) -> None:
    path = write_gguf(wide, tmp_path / "a", old=False, nextn_predict_layers=1)
    config = read_config(open_checkpoint(path))
    assert config.num_layers == wide.config.num_hidden_layers - 1  # the heads are counted, too
    path = write_gguf(wide, tmp_path / "b", old=False, without="blk.1.attn_k_b")
    with pytest.raises(ModelError, match=r"lacks the tensor blk\.1\.attn_k_b\.weight"):
        load_model(open_checkpoint(path), load_provider("cpu"))
    path = write_gguf(wide, tmp_path / "c", old=False, expert_group_count=5)
    with pytest.raises(ModelError, match="expert_group_count = 5, which must be a divisor of 12"):
        read_config(open_checkpoint(path))
