"""Name rules: spelled out, applied, inverted; load, save, load gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elinvar.base.config import ModelConfig, RopeConfig
from elinvar.base.errors import ModelError
from elinvar.ops.layout import Weight, pack_float, pack_q8, unpack
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.fixes import AddOne, TransposeHeads, UnpermuteRows
from elinvar.weights.load import load_weights
from elinvar.weights.quants import SUPPORTED, dequantize
from elinvar.weights.rules import Part, Rule, bind
from elinvar.weights.save import save_state
from elinvar.weights.tensor import HostTensor
from model_files import float_rows, host_tensor, write_gguf

HEADS, DIM, K = 3, 8, 256

CONFIG = ModelConfig(
    family="llama",
    vocab_size=48,
    dim=K,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=DIM,
    ff_dim=64,
    max_context=64,
    norm_eps=1e-5,
    layer_kinds=("full", "full"),
    rope={"full": RopeConfig(10000.0, DIM)},
    attn_scale=DIM**-0.5,
)
RULES = [
    Rule("embed", "model.embed.weight", "token_embd.weight", (48, K)),
    Rule(
        "layers.{i}.q",
        "model.layers.{i}.q.weight",
        "blk.{i}.attn_q.weight",
        (HEADS * DIM, K),
        gguf_fix=UnpermuteRows(HEADS),
    ),
    Rule(
        "layers.{i}.attn_norm",
        "model.layers.{i}.norm.weight",
        "blk.{i}.attn_norm.weight",
        (K,),
        hf_fix=AddOne(),
    ),
    Rule("norm", "model.norm.weight", "output_norm.weight", (K,), hf_fix=AddOne()),
    Rule("head", "lm_head.weight", "output.weight", (48, K), optional=True),
    Rule("only_gguf", None, "rope_freqs.weight", optional=True),
]


def converted(w: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    return w.reshape(HEADS, 2, DIM // 2, -1).swapaxes(1, 2).reshape(w.shape)


def test_bind_spells_rules_out_layer_by_layer() -> None:
    assert [(b.name, b.source) for b in bind(RULES, "gguf", 2)] == [
        ("embed", "token_embd.weight"),
        ("layers.0.q", "blk.0.attn_q.weight"),
        ("layers.0.attn_norm", "blk.0.attn_norm.weight"),
        ("layers.1.q", "blk.1.attn_q.weight"),
        ("layers.1.attn_norm", "blk.1.attn_norm.weight"),
        ("norm", "output_norm.weight"),
        ("head", "output.weight"),
        ("only_gguf", "rope_freqs.weight"),
    ]
    hf = bind(RULES, "safetensors", 1)
    assert [b.name for b in hf] == ["embed", "layers.0.q", "layers.0.attn_norm", "norm", "head"]
    assert hf[1].fix is None and hf[2].fix == AddOne() and hf[4].optional


@pytest.mark.parametrize("dtype", SUPPORTED)
def test_unpermute_undoes_the_converter(dtype: str) -> None:
    fix, stored = UnpermuteRows(HEADS), host_tensor(dtype, HEADS * DIM, K)
    canonical = fix.apply(stored)
    assert np.array_equal(converted(dequantize(canonical)), dequantize(stored))
    assert np.array_equal(fix.invert(canonical).data, stored.data)
    assert (canonical.shape, canonical.dtype) == (stored.shape, dtype)


@pytest.mark.parametrize("dtype", ["F16", "Q8_0"])
def test_unpermute_leaves_what_is_not_rotated(dtype: str) -> None:
    fix, stored = UnpermuteRows(2, 4, last=True), host_tensor(dtype, 2 * 7, K)
    rows, expected = dequantize(stored), dequantize(fix.apply(stored))
    order = [0, 1, 2, 3, 5, 4, 6]
    assert np.array_equal(rows.reshape(2, 7, K)[:, order], expected.reshape(2, 7, K))
    assert np.array_equal(fix.invert(fix.apply(stored)).data, stored.data)


def test_transpose_heads() -> None:
    values = np.arange(2 * 3 * 5, dtype=np.float32).reshape(6, 5)
    stored = HostTensor("w", (6, 5), "F32", values.view(np.uint8))
    turned = TransposeHeads(2).apply(stored)
    assert turned.shape == (10, 3)
    assert np.array_equal(
        dequantize(turned).reshape(2, 5, 3), values.reshape(2, 3, 5).swapaxes(1, 2)
    )
    back = TransposeHeads(2).invert(turned)
    assert back.shape == (6, 5) and np.array_equal(dequantize(back), values)
    assert TransposeHeads(2).stored_shape((10, 3)) == (6, 5)
    blocks = host_tensor("Q8_0", 6, K)
    turned = TransposeHeads(2).apply(blocks)
    expected = dequantize(blocks).reshape(2, 3, K).swapaxes(1, 2).reshape(-1, 3)
    assert turned.dtype == "F32" and np.array_equal(dequantize(turned), expected)


def test_add_one() -> None:
    values = np.float32([0.25, -1, 3e-6, 7])
    stored = HostTensor("g", (4,), "BF16", float_rows("BF16", values[None]))
    gains = AddOne().apply(stored)
    expected = dequantize(stored) + 1
    assert gains.dtype == "F32" and np.array_equal(dequantize(gains), expected)
    again = AddOne().apply(AddOne().invert(gains))
    assert np.array_equal(again.data, gains.data)


E, F, D = 3, 6, 32
"""Experts, their rows, their inputs."""
MERGED = [
    # q and k take turns by head in one matrix, their biases in one vector; v is what is left.
    *(
        rule
        for at, name in enumerate("qk")
        for rule in (
            Rule(
                f"layers.{{i}}.{name}",
                "l.{i}.qkv.weight",
                None,
                (8, D),
                hf_part=Part((20, D), 4 * at, 4, 8),
            ),
            Rule(
                f"layers.{{i}}.{name}_bias",
                "l.{i}.qkv.bias",
                None,
                (8,),
                hf_part=Part((20,), 4 * at, 4, 8),
            ),
        )
    ),
    Rule("layers.{i}.v", "l.{i}.qkv.weight", None, (4, D), hf_part=Part((20, D), 16)),
    Rule("layers.{i}.v_bias", "l.{i}.qkv.bias", None, (4,), hf_part=Part((20,), 16)),
    # Gates and ups in turn, by columns, experts in a stack; only layer 1 has them.
    *(
        Rule(
            f"layers.{{i}}.experts.{e}.{name}",
            "l.{i}.experts",
            None,
            (F, D),
            hf_part=Part((E, 2 * F, D), 2 * F * e + at, 1, 2),
            hf_transposed=True,
            layers=range(1, 2),
        )
        for e in range(E)
        for at, name in enumerate(("gate", "up"))
    ),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_parts_of_merged_and_stacked_tensors(dtype: type, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = {f"l.{i}.qkv.weight": rng.standard_normal((20, D)).astype(dtype) for i in range(2)}
    stored |= {f"l.{i}.qkv.bias": rng.standard_normal(20).astype(np.float32) for i in range(2)}
    stored["l.1.experts"] = rng.standard_normal((E, D, 2 * F)).astype(dtype)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    save_file(stored, tmp_path / "model.safetensors")
    state = load_weights(open_checkpoint(tmp_path), MERGED, CONFIG)
    assert len(state) == 2 * 6 + 2 * E
    for i in range(2):
        qkv, bias = stored[f"l.{i}.qkv.weight"], stored[f"l.{i}.qkv.bias"]
        for name, rows in (
            ("q", [0, 1, 2, 3, 8, 9, 10, 11]),
            ("k", [4, 5, 6, 7, 12, 13, 14, 15]),
            ("v", [16, 17, 18, 19]),
        ):
            assert np.array_equal(unpack(state[f"layers.{i}.{name}"]), qkv[rows])
            assert np.array_equal(state[f"layers.{i}.{name}_bias"], bias[rows])
    for e in range(E):
        both = stored["l.1.experts"][e].T
        assert np.array_equal(unpack(state[f"layers.1.experts.{e}.gate"]), both[0::2])
        assert np.array_equal(unpack(state[f"layers.1.experts.{e}.up"]), both[1::2])
    save_state(state, MERGED, 2, tmp_path / "saved", {"architectures": ["X"]})
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(stored)
    for name, values in stored.items():
        assert saved[name].dtype == values.dtype and np.array_equal(saved[name], values)


def make_gguf(path: Path, dtype: str) -> Path:
    tensors = {
        b.source: (dtype, host_tensor(dtype, b.shape[0], K, seed=i).data)
        if len(b.shape) == 2
        else ("F32", host_tensor("F32", 1, K, seed=i).data)
        for i, b in enumerate(bind(RULES, "gguf", 2))
        if b.shape
    }
    return write_gguf(path, tensors)


def same_bits(a: object, b: object) -> bool:
    if isinstance(a, Weight) and isinstance(b, Weight):
        return (a.kind, a.shape) == (b.kind, b.shape) and np.array_equal(a.data, b.data)
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_load_save_load_gives_the_same_bits(dtype: str, tmp_path: Path) -> None:
    """From GGUF (interleaved q, whole gains) to Hugging Face form (gains less one) and back in."""
    first = load_weights(open_checkpoint(make_gguf(tmp_path / "m.gguf", dtype)), RULES, CONFIG)
    config = {"architectures": ["LlamaForCausalLM"]}
    save_state(first, RULES, 2, tmp_path / "hf", config)
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.metadata == config
    second = load_weights(checkpoint, RULES, CONFIG)
    save_state(second, RULES, 2, tmp_path / "again", config)
    third = load_weights(open_checkpoint(tmp_path / "again"), RULES, CONFIG)
    assert set(first) == set(second) == set(third)
    for name in second:
        assert same_bits(second[name], third[name])
        # A random f32 gain is not of the form 1 + g; a stored one is.
        if isinstance(first[name], Weight):
            assert same_bits(first[name], second[name])
    saved = load_file(tmp_path / "hf" / "model.safetensors") if dtype != "BF16" else {}
    for name in saved:
        if "norm" in name:
            canonical = name.removeprefix("model.").removesuffix(".weight")
            gains = second[canonical.replace(".norm", ".attn_norm")]
            assert np.array_equal(saved[name] + np.float32(1), gains)


def test_quantised_weights_are_saved_as_their_values(tmp_path: Path) -> None:
    codes = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
    weight = pack_q8(codes, np.full((2, 2), 0.5, np.float16))
    save_state({"w": weight}, [Rule("w", "w.weight", None)], 1, tmp_path, {})
    assert np.array_equal(load_file(tmp_path / "model.safetensors")["w.weight"], codes * 0.5)


def test_save_needs_every_weight(tmp_path: Path) -> None:
    weight = pack_float("f32", np.zeros((48, K), np.float32))
    with pytest.raises(ModelError, match=r"the weight layers\.0\.q is missing"):
        save_state({"embed": weight}, RULES, 2, tmp_path / "hf", {})
    assert not (tmp_path / "hf").exists()


def test_saved_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ModelError, match="cannot be made"):
        save_state({}, [], 1, tmp_path / "file" / "hf", {})
