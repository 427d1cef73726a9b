"""gpt-oss as it is published: MXFP4 in Hugging Face folders and in GGUF files, against the values that
transformers makes of it; and what ends an answer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from elinvar.engine.tokenizer import load_tokenizer
from elinvar.models.load import load_model
from elinvar.ops import load_provider
from elinvar.weights.checkpoint import open_checkpoint
from families.base import SIZES
from families.gpt_oss import CASES
from gguf_models import write_model
from helpers import assert_parity, run_tokens
from test_models_tiny import load_f32, prompt, reference_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXPERTS, DIM, FF = 6, 64, 96
SHAPES = {"gate_up_proj": (EXPERTS, 2 * FF, DIM), "down_proj": (EXPERTS, DIM, FF)}


def save_mxfp4(folder: Path, **more: Any) -> None:
    """A folder with experts of random codes. more: settings."""
    torch.manual_seed(3)
    settings = SIZES | {"intermediate_size": FF} | CASES["gpt-oss"].settings | more
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.25)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(4)
    for name in [name for name in tensors if name.endswith(tuple(SHAPES))]:
        del tensors[name]
        shape = SHAPES[name.rpartition(".")[2]]
        codes = rng.integers(0, 16, (*shape[:2], shape[2] // 32, 32), np.uint8)
        scales = rng.integers(122, 126, codes.shape[:-1], np.uint8)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


def dequantised(folder: Path) -> Any:
    """What transformers makes of it."""
    scheme = transformers.Mxfp4Config(dequantize=True)
    load = transformers.GptOssForCausalLM.from_pretrained
    return load(folder, quantization_config=scheme, dtype=torch.float32).eval()


@pytest.mark.parametrize("provider", ["ref", "cpu"])
def test_mxfp4_parity(provider: str, tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    ops, log = load_provider(provider), list[str]()
    expected = reference_logits(dequantised(tmp_path), prompt())
    assert_parity(run_tokens(load_f32(tmp_path, ops), ops, prompt()), expected)
    quantised = load_model(open_checkpoint(tmp_path), ops, log=log.append)
    assert f"MXFP4 -> q5 g32: {3 * EXPERTS * SIZES['num_hidden_layers']} matrices" in log
    assert np.isfinite(run_tokens(quantised, ops, prompt())).all()


def test_gguf_parity(tmp_path: Path) -> None:
    """What llama.cpp's converter makes of the folder: the same codes, gate and up apart."""
    save_mxfp4(tmp_path)
    reference, ops, log = dequantised(tmp_path), load_provider("cpu"), list[str]()
    path = write_model(reference, "gpt-oss", tmp_path / "tiny.gguf", experts="MXFP4")
    expected = reference_logits(reference, prompt())
    assert_parity(run_tokens(load_f32(path, ops), ops, prompt()), expected)
    load_model(open_checkpoint(path), ops, log=log.append)
    assert f"MXFP4 -> q5 g32: {3 * EXPERTS * SIZES['num_hidden_layers']} matrices" in log


HARMONY = {199999: "<|endoftext|>", 200002: "<|return|>", 200007: "<|end|>", 200012: "<|call|>"}


@cache
def vocabulary() -> Backend:
    """Bytes, then what else harmony's tokenizer has, under its own ids."""
    plain = {f"t{i}": i for i in range(201_088) if i not in HARMONY}
    backend = Backend(models.BPE(plain | {text: i for i, text in HARMONY.items()}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(HARMONY.values()))
    return backend


@pytest.mark.parametrize("listed", [True, False])
def test_what_ends_an_answer(listed: bool, tmp_path: Path) -> None:
    """All that generation_config.json lists, and the same where it is missing; <|end|> ends a message
    of several that an answer may have."""
    save_mxfp4(tmp_path)
    vocabulary().save(str(tmp_path / "tokenizer.json"))
    if listed:
        generation = {"eos_token_id": [200002, 199999, 200012]}
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    else:
        (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": 200002}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(open_checkpoint(tmp_path))
    assert tokenizer.eos_ids == {200002, 199999, 200012}
