"""Families from GGUF files against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from elinvar.ops import load_provider
from families.chatglm import chatglm_tensors
from gguf_models import write_model
from helpers import assert_parity, run_tokens
from test_models_tiny import load_f32, make_reference, prompt, reference_logits

CASES = [
    ("llama-3", "llama"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("qwen2", "qwen2"),
    ("qwen3-tied", "qwen3"),
    ("starcoder2-full", "starcoder2"),
    ("phi", "phi2"),
    ("gpt-neox", "gptneox"),
    ("gpt-neox-serial", "gptneox"),
    ("gpt2", "gpt2"),
    ("mixtral", "llama"),
    ("qwen2-moe", "qwen2moe"),
    ("qwen3-moe", "qwen3moe"),
    ("glm4-moe", "glm4moe"),
    ("glm", "chatglm"),
    ("glm4", "glm4"),
    ("glm4-tied", "glm4"),
    ("olmo2", "olmo2"),
    ("minicpm3-first", "minicpm3"),
    ("hunyuan", "hunyuan-dense"),
    ("ernie-moe", "ernie4_5-moe"),
    ("olmoe", "olmoe"),
    ("gemma", "gemma"),
    ("ernie", "ernie4_5"),
    ("stablelm", "stablelm"),
    ("stablelm-parallel", "stablelm"),
    ("minimax-m2", "minimax-m2"),
    ("minimax-m2-tied", "minimax-m2"),
    ("granite-moe", "granitemoe"),
    ("smollm3", "smollm3"),
    ("seed-oss", "seed_oss"),
    ("exaone4", "exaone4"),
    ("exaone4-full", "exaone4"),
    ("cohere", "command-r"),
    ("cohere2", "cohere2"),
    ("phi3", "phi3"),
    ("phi3-longrope", "phi3"),
    ("granite", "granite"),
    ("granite-tied", "granite"),
    ("minicpm", "minicpm"),
    ("internlm2", "internlm2"),
    ("internlm3", "llama"),
    ("olmo3-yarn", "olmo2"),
    ("gemma3n", "gemma3n"),
    ("gpt-oss", "gpt-oss"),
    ("ministral3", "mistral3"),
    ("llama4-gguf", "llama4"),
]


@pytest.mark.parametrize("provider", ["ref", "cpu"])
@pytest.mark.parametrize(("case", "arch"), CASES, ids=lambda one: one)
def test_gguf_parity(case: str, arch: str, provider: str, tmp_path: Path) -> None:
    reference, ops = make_reference(case), load_provider(provider)
    if arch in ("gemma", "gemma2", "gemma3"):
        # GGUF files do not say query_pre_attn_scalar: it is the head dim.
        for layer in reference.model.layers:
            layer.self_attn.scaling = reference.config.head_dim**-0.5
    model = load_f32(write_model(reference, arch, tmp_path / "tiny.gguf"), ops)
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(reference, prompt()))


@pytest.mark.parametrize("case", ["chatglm", "chatglm-plain"])
def test_gguf_of_chatglm_as_published(case: str, tmp_path: Path) -> None:
    """q, k and v in one matrix."""
    reference, ops = make_reference(case), load_provider("cpu")
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    merged = {
        name.removeprefix("transformer."): values
        for name, values in chatglm_tensors({}, state).items()
    }
    model = load_f32(write_model(reference, "chatglm", tmp_path / "tiny.gguf", merged), ops)
    assert_parity(run_tokens(model, ops, prompt()), reference_logits(reference, prompt()))
