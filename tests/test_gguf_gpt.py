"""GGUF files of the families with layer norms and biases, as llama.cpp's converter makes them of
models in transformers: its names, matrices as (out, in), q, k and v of GPT-NeoX sorted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elinvar.ops import load_provider
from helpers import assert_parity, run_tokens
from test_models_tiny import load_f32, make_reference, prompt, reference_logits

gguf = pytest.importorskip("gguf")

LLAMA_LIKE = {
    "model.embed_tokens": "token_embd",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "input_layernorm": "attn_norm",
    "lm_head": "output",
}
NAMES = {
    "starcoder2": LLAMA_LIKE
    | {
        "model.norm": "output_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "phi2": LLAMA_LIKE
    | {
        "model.final_layernorm": "output_norm",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    "gptneox": {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "lm_head": "output",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}


def write_gguf(reference: Any, arch: str, path: Path) -> None:
    config = reference.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    gpt2 = arch == "gpt2"
    writer.add_feed_forward_length(4 * config.hidden_size if gpt2 else config.intermediate_size)
    heads = config.num_attention_heads
    writer.add_head_count(heads)
    if arch in ("starcoder2", "phi2"):
        writer.add_head_count_kv(config.num_key_value_heads)
    eps = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    writer.add_layer_norm_eps(next(getattr(config, e) for e in eps if hasattr(config, e)))
    if arch in ("phi2", "gptneox"):
        part = config.rope_parameters["partial_rotary_factor"]
        writer.add_rope_dimension_count(int(part * config.hidden_size // heads))
    if arch == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    for name, parameter in reference.named_parameters():
        stem, _, kind = name.rpartition(".")
        values = parameter.detach().numpy()
        if gpt2 and values.ndim > 1 and ".h." in stem:
            values = values.T
        if "query_key_value" in stem:
            by_head = values.reshape(heads, 3, -1, *values.shape[1:])
            values = by_head.swapaxes(0, 1).reshape(values.shape)
        before, layer, stem = _split(stem)
        prefix = "" if layer is None else f"blk.{layer}."
        writer.add_tensor(f"{prefix}{NAMES[arch][before + stem]}.{kind}", values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split(stem: str) -> tuple[str, str | None, str]:
    """Of a layer's weight its number and the rest of its name."""
    parts = stem.split(".")
    if len(parts) > 3 and parts[2].isdecimal():
        return "", parts[2], ".".join(parts[3:])
    return stem, None, ""


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        ("starcoder2-full", "starcoder2"),
        ("phi", "phi2"),
        ("gpt-neox", "gptneox"),
        ("gpt-neox-serial", "gptneox"),
        ("gpt2", "gpt2"),
    ],
)
def test_gguf_parity(case: str, arch: str, tmp_path: Path) -> None:
    reference, ops = make_reference(case), load_provider("cpu")
    write_gguf(reference, arch, tmp_path / "tiny.gguf")
    model = load_f32(tmp_path / "tiny.gguf", ops)
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(reference, prompt()))
