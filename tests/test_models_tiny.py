"""Both families against transformers in float32, on tiny random models of odd sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.models.registry import Model, find_family, load_model, read_config
from elinvar.ops import Ops, load_provider
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import save_state
from helpers import Span, assert_parity, make_batch, make_cache, run_sequences, run_tokens

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 101
LENGTH = 75
"""Longer than two blocks and nine windows."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR8 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GEMMA: dict[str, Any] = {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 24, "num_key_value_heads": 1}),
    "gemma3": ("gemma3", GEMMA),
    "gemma3-linear": ("gemma3", GEMMA | {"rope_parameters": LINEAR8, "head_dim": 32}),
    "gemma3-types": (
        "gemma3",
        GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def make_reference(case: str, dtype: Any = torch.float32) -> Any:
    """A transformers model with random weights; norm gains are random too."""
    family, extra = CASES[case]
    torch.manual_seed(len(case))
    settings: dict[str, Any] = SIZES | {"num_hidden_layers": 3} | extra
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    else:
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual 0.02, so that every part of the model matters.
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.2
            )
    return model.to(dtype).eval()


@cache
def prompt(seed: int = 0, length: int = LENGTH) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB, length).tolist())


def read_back(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logits(reference: Any, ids: tuple[int, ...]) -> Any:
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module", params=["ref", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_provider(request.param)


def load_f32(path: Path, ops: Ops) -> Model:
    return load_model(open_checkpoint(path), ops, weight_format="f32")


@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case: str, ops: Ops, tmp_path: Path) -> None:
    reference = make_reference(case)
    reference.save_pretrained(tmp_path)
    model = load_f32(tmp_path, ops)
    expected = reference_logits(reference, prompt())
    for chunk in (LENGTH, 33, 1):
        assert_parity(run_tokens(model, ops, prompt(), chunk), expected)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_in_shards(case: str, dtype: Any, ops: Ops, tmp_path: Path) -> None:
    reference = make_reference(case, dtype)
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_f32(tmp_path, ops)
    expected = reference_logits(read_back(tmp_path), prompt())
    assert_parity(run_tokens(model, ops, prompt()), expected)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_sequences_do_not_see_each_other(case: str, ops: Ops, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path)
    model = load_f32(tmp_path, ops)
    prompts = [prompt(seed, length) for seed, length in enumerate((5, 40, 33))]
    together = run_sequences(model, ops, prompts, chunk=16)
    for ids, logits in zip(prompts, together, strict=True):
        alone = run_tokens(model, ops, ids)
        # The oracle's sums go through BLAS, whose order is its own.
        if ops.name == "ref":
            assert_parity(logits, alone, 1e-6)
        else:
            assert np.array_equal(logits, alone)


@pytest.mark.parametrize("case", ["llama-tied", "gemma3"])
def test_saved_state_is_what_transformers_reads(case: str, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    config = read_config(checkpoint)
    rules = find_family(checkpoint).rules(config)
    state = load_weights(checkpoint, rules, config)
    save_state(state, rules, config.num_layers, tmp_path / "b", checkpoint.metadata)
    ops = load_provider("ref")
    model = load_f32(tmp_path / "a", ops)
    expected = reference_logits(read_back(tmp_path / "b"), prompt())
    assert_parity(run_tokens(model, ops, prompt()), expected)


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(reference: Any, family: str, path: Path) -> None:
    """What llama.cpp's converter makes of the reference: its names, its order of rotary pairs,
    Gemma's gains with their 1, and Llama 3.1's scaling as divisors of the frequencies."""
    config = reference.config
    after_attention = "ffn_norm" if family == "llama" else "post_attention_norm"
    names = GGUF_NAMES | {"post_attention_layernorm": after_attention}
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "llama":
        theta = config.rope_parameters["rope_theta"]
        writer.add_rope_freq_base(theta)
        plain = theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        divisors = plain / reference.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", np.maximum(divisors, 1).astype(np.float32))
        writer.add_tensor("output.weight", reference.lm_head.weight.detach().numpy())
    else:
        writer.add_sliding_window(config.sliding_window)
    for name, parameter in reference.model.named_parameters():
        stem = name.removesuffix(".weight")
        values = parameter.detach().numpy()
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if family == "gemma3" and stem.endswith("norm"):
            values = values + np.float32(1)
        if stem.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            writer.add_tensor(f"blk.{layer}.{names[stem]}.weight", np.ascontiguousarray(values))
        else:
            writer.add_tensor(f"{names[stem]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["llama-3", "gemma3"])
def test_gguf_parity(case: str, ops: Ops, tmp_path: Path) -> None:
    reference = make_reference(case)
    if case == "gemma3":
        # GGUF files do not say query_pre_attn_scalar: it is the head dim.
        for layer in reference.model.layers:
            layer.self_attn.scaling = reference.config.head_dim**-0.5
    path = tmp_path / "tiny.gguf"
    write_gguf(reference, CASES[case][0], path)
    model = load_f32(path, ops)
    expected = reference_logits(reference, prompt())
    assert_parity(run_tokens(model, ops, prompt()), expected)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_no_logits_asked_for(case: str, ops: Ops, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path)
    model = load_f32(tmp_path, ops)
    batch = make_batch([Span(prompt(), 0, 40, [1, 0])], len(model.kv_specs("f16")))
    batch = replace(batch, logit_rows=np.empty(0, np.int32))
    assert model.forward(batch, make_cache(model, ops, 2, "f16")).shape == (0, VOCAB)
