"""Checkpoints of models that also see: the text model inside, whatever its weights are called, and what
the configurations of published ones say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elinvar.base.config import TemperatureConfig
from elinvar.base.errors import ModelError
from elinvar.models.registry import read_config
from elinvar.ops import load_provider
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from helpers import run_tokens
from test_models_tiny import load_f32, make_reference, prompt
from test_registry import checkpoint

SIGHTED = ["gemma3-sees", "mistral3", "llama4-sees"]


def renamed(name: str) -> str:
    """As transformers calls weights since 4.52."""
    inner = name.removeprefix("language_model.")
    return inner.replace("model.", "model.language_model.", 1) if inner != name else f"model.{name}"


@pytest.mark.parametrize("case", SIGHTED)
def test_both_ways_to_name_weights(case: str, tmp_path: Path) -> None:
    make_reference(case).save_pretrained(tmp_path)
    ops, path = load_provider("cpu"), tmp_path / "model.safetensors"
    first, tensors = run_tokens(load_f32(tmp_path, ops), ops, prompt()), load_file(path)
    assert any(name.startswith("language_model.model.") for name in tensors)
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, path)
    assert any("vision" in name for name in open_checkpoint(tmp_path).tensors)
    assert np.array_equal(run_tokens(load_f32(tmp_path, ops), ops, prompt()), first)
    name = "model.language_model.norm.weight"
    both = {"language_model.model.norm.weight": tensors["language_model.model.norm.weight"]}
    save_file({name: both["language_model.model.norm.weight"], **both}, path)
    with pytest.raises(ModelError, match="which are one weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("head", [True, False])
def test_a_head_that_is_there_is_used(head: bool, tmp_path: Path) -> None:
    """Whatever is said of it inside and outside; what ends an answer is said outside."""
    outer = {"architectures": ["X"], "tie_word_embeddings": head, "eos_token_id": [1, 106]}
    inner = {"tie_word_embeddings": head, "hidden_size": 8, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": inner}))
    names = ["language_model.model.x", *(["language_model.lm_head.weight"] if head else [])]
    save_file({name: np.zeros(4, np.float32) for name in names}, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert found.metadata == inner | outer | {"tie_word_embeddings": not head}
    assert set(found.tensors) == {"model.x", *(["lm_head.weight"] if head else [])}


def published(tmp_path: Path, config: dict[str, Any]) -> Checkpoint:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def test_gemma_3_4b(tmp_path: Path) -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    config = read_config(published(tmp_path, outer | {"text_config": text}))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262_208 and config.layer_kinds.count("full") == 5
    assert (config.rope["full"].factor, config.rope["sliding"].factor) == (8, 1)


SCOUT: dict[str, Any] = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": 4,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10_485_760,
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500_000.0,
    "use_qk_norm": True,
    "vocab_size": 202_048,
}


def test_llama_4_scout(tmp_path: Path) -> None:
    outer = {"architectures": ["Llama4ForConditionalGeneration"]}
    config = read_config(published(tmp_path, outer | {"text_config": SCOUT}))
    assert config.layer_kinds == ("chunked", "chunked", "chunked", "full") * 12
    assert config.temperature == {"full": TemperatureConfig(0.1, 8192, 1)}
    assert config.moe is not None and len(config.moe.layers) == 48
    assert (config.moe.ff_dim, config.moe.shared_ff_dim, config.ff_dim) == (8192, 8192, 16384)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"no_rope_layers": [1] * 47}, "no_rope_layers"),
        ({"no_rope_layers": 3}, "no_rope_layers"),
        ({"layer_types": ["full_attention"] * 48}, "layer_types"),
        ({"moe_layers": [48]}, "moe_layers"),
        ({"moe_layers": "all"}, "moe_layers"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"floor_scale": 0.5}, "floor_scale"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_parameters"),
    ],
)
def test_what_llama_4_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_config(checkpoint("Llama4ForCausalLM", SCOUT | changes))
