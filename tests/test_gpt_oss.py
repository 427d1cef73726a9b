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
from helpers import assert_parity, run_tokens
from test_models_tiny import load_f32, prompt, reference_logits

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXPERTS, DIM, FF = 6, 64, 96
SHAPES = {"gate_up_proj": (EXPERTS, 2 * FF, DIM), "down_proj": (EXPERTS, DIM, FF)}


def save_mxfp4(folder: Path) -> dict[str, np.ndarray]:
    """A folder with experts of random codes. Returns codes and scales by the names of the model."""
    torch.manual_seed(3)
    settings = SIZES | {"intermediate_size": FF} | CASES["gpt-oss"].settings
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.25)
    model.save_pretrained(folder)
    tensors, drawn = load_file(folder / "model.safetensors"), {}
    rng = np.random.default_rng(4)
    for name in [name for name in tensors if name.endswith(tuple(SHAPES))]:
        del tensors[name]
        shape = SHAPES[name.rpartition(".")[2]]
        codes = rng.integers(0, 16, (*shape[:2], shape[2] // 32, 32), np.uint8)
        scales = rng.integers(122, 126, codes.shape[:-1], np.uint8)
        drawn |= {name: codes, f"{name}_scales": scales}
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return drawn


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


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.router": "ffn_gate_inp",
}


def write_gguf(folder: Path, drawn: dict[str, np.ndarray], path: Path) -> None:
    """What llama.cpp's converter makes of the folder: gate and up apart, an expert's codes i and
    i + 16 of a block in one byte behind its scale."""
    config = transformers.GptOssConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(config.rope_parameters["beta_fast"])

    def experts(at: str, part: str, codes: np.ndarray, scales: np.ndarray) -> None:
        blocks = codes[..., :16] | codes[..., 16:] << 4
        raw = np.concatenate([scales[..., None], blocks], -1).reshape(*codes.shape[:2], -1)
        kind = gguf.GGMLQuantizationType.MXFP4
        writer.add_tensor(f"{at}ffn_{part}_exps.weight", raw, raw_dtype=kind)

    for name, values in load_file(folder / "model.safetensors").items():
        if name.endswith(("_blocks", "_scales")):
            continue
        at, stem = "", name
        if name.startswith("model.layers."):
            _, _, layer, stem = name.split(".", 3)
            at = f"blk.{layer}."
        if stem == "mlp.experts.gate_up_proj_bias":
            for part, half in (("gate", values[:, ::2]), ("up", values[:, 1::2])):
                writer.add_tensor(f"{at}ffn_{part}_exps.bias", half.copy())
        elif stem == "mlp.experts.down_proj_bias":
            writer.add_tensor(f"{at}ffn_down_exps.bias", values)
        elif stem == "self_attn.sinks":
            writer.add_tensor(f"{at}attn_sinks.weight", values)
        else:
            stem, _, kind = stem.rpartition(".")
            writer.add_tensor(f"{at}{NAMES[stem]}.{kind}", values)
    for name in (name for name in drawn if not name.endswith("_scales")):
        at, codes, scales = f"blk.{name.split('.')[2]}.", drawn[name], drawn[f"{name}_scales"]
        if name.endswith("down_proj"):
            experts(at, "down", codes, scales)
        else:
            experts(at, "gate", codes[:, ::2], scales[:, ::2])
            experts(at, "up", codes[:, 1::2], scales[:, 1::2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_parity(tmp_path: Path) -> None:
    drawn, ops = save_mxfp4(tmp_path), load_provider("cpu")
    write_gguf(tmp_path, drawn, tmp_path / "tiny.gguf")
    expected = reference_logits(dequantised(tmp_path), prompt())
    assert_parity(run_tokens(load_f32(tmp_path / "tiny.gguf", ops), ops, prompt()), expected)


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
