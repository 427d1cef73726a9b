"""Quantised checkpoints as published: a tiny Llama in every scheme, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.models.load import load_model
from elinvar.ops import load_provider
from elinvar.ops.layout import unpack
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.load import load_weights
from elinvar.weights.quants import dequantize, kind_of, to_codes
from elinvar.weights.rules import Part, Rule
from families.base import SIZES
from families.deepseek import LATENT
from helpers import assert_parity, log_softmax, run_tokens
from test_quants import packed
from test_rules import CONFIG

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file

import quantisers as q  # noqa: E402 (needs torch)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
HQQ = {"quant_method": "hqq"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
V2 = {"checkpoint_format": "gptq_v2"}
SCHEMES: dict[str, tuple[dict[str, Any], Callable[..., q.Packed], str, float]] = {
    # settings, packer, note, and how far packed weights may be off, as a part of the largest
    "gptq": (GPTQ, q.gptq, "GPTQ int4 g32 -> q4 g32 (mins rounded to f16)", 2**-11),
    "gptq-symmetric": (GPTQ, partial(q.gptq, sym=True), "GPTQ int4 g32 -> q4 g32", 0),
    "gptq-v2": (
        GPTQ | V2 | {"group_size": 64},
        partial(q.gptq, size=64, v2=True),
        "GPTQ int4 g64 -> q4 g32 (mins rounded to f16)",
        2**-11,
    ),
    "gptq-v2-symmetric": (GPTQ | V2, partial(q.gptq, sym=True, v2=True), "-> q4 g32", 0),
    "gptq-channel": (GPTQ | {"group_size": -1}, partial(q.gptq, size=-1), "-> q4 g32", 2**-11),
    "gptq-act-order": (
        GPTQ | {"desc_act": True},
        partial(q.gptq, act=True),
        "GPTQ int4 g32 -> q8 g32 (act-order, requantised)",
        1 / 250,
    ),
    "gptq-8": (
        GPTQ | {"bits": 8},
        partial(q.gptq, bits=8),
        "GPTQ int8 g32 -> q8 g32 (groups beyond ±127 requantised)",
        1 / 250,
    ),
    "gptq-8-symmetric": (
        GPTQ | {"bits": 8, "group_size": -1},
        partial(q.gptq, bits=8, size=-1, sym=True),
        "-> q8 g32 (groups beyond ±127 requantised)",
        1 / 250,
    ),
    "gptq-2": (GPTQ | {"bits": 2}, partial(q.gptq, bits=2), "GPTQ int2 g32 -> q4 g32", 2**-11),
    "awq": (AWQ, q.awq, "AWQ int4 g32 -> q4 g32 (mins rounded to f16)", 2**-11),
    "w4a16": (
        CT | {"format": "pack-quantized"},
        q.packed_ints,
        "compressed-tensors int4 g32 -> q4 g32 (scales rounded to f16)",
        2**-11,
    ),
    "w4a16-asymmetric": (
        CT | {"format": "pack-quantized"},
        partial(q.packed_ints, sym=False),
        "(scales and mins rounded to f16)",
        2**-11,
    ),
    "w4a16-channel": (CT, partial(q.packed_ints, size=-1), "scales rounded to f16", 2**-11),
    "w8a16": (CT, partial(q.packed_ints, bits=8, size=-1), "groups beyond ±127", 1 / 250),
    "w8a8": (
        CT | {"format": "int-quantized"},
        q.int8,
        "compressed-tensors int8 -> q8 g32 (scales rounded to f16, groups beyond ±127 requantised)",
        1 / 250,
    ),
    "w8a8-fp8": (
        CT | {"format": "float-quantized"},
        partial(q.fp8, block=None),
        "FP8 tensor -> q8 g32 (requantised)",
        1 / 250,
    ),
    "w8a8-fp8-channel": (CT, lambda w: q.fp8(w, (1, w.shape[1])), "(requantised)", 1 / 250),
    "nvfp4": (
        CT | {"format": "nvfp4-pack-quantized"},
        partial(q.nvfp4, divided=True),
        "NVFP4 -> q8 g32 (requantised)",
        1 / 250,
    ),
    "nvfp4-modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        partial(q.nvfp4, divided=False),
        "NVFP4 -> q8 g32 (requantised)",
        1 / 250,
    ),
    "sparse": (
        CT | {"format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}},
        partial(q.sparse24, then="bf16"),
        "2:4 sparse BF16 -> bf16",
        0,
    ),
    "sparse-fp8": (CT, partial(q.sparse24, then="fp8"), "FP8 1x64 -> q8", 1 / 250),
    "fp8-blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 48]},
        partial(q.fp8, block=(32, 48), name=".weight_scale_inv"),
        "FP8 32x48 -> q8 g32 (requantised)",
        1 / 250,
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, q.mxfp4, "MXFP4 -> q5 g32", 0),
    "mxfp4-compressed": (
        CT | {"format": "mxfp4-pack-quantized"},
        partial(q.mxfp4, endings=(".weight_packed", ".weight_scale")),
        "MXFP4 -> q5 g32",
        0,
    ),
    "hqq": (HQQ, q.hqq, "HQQ int4 g32 -> q4 g32 (mins rounded to f16)", 2**-11),
    "hqq-8": (HQQ, partial(q.hqq, bits=8), "HQQ int8 g32 -> q8 g32 (requantised)", 1 / 250),
    "hqq-5": (HQQ, partial(q.hqq, bits=5), "HQQ int5 g32 -> q5 g32 (mins", 2**-11),
    "hqq-3": (HQQ, partial(q.hqq, bits=3), "HQQ int3 g32 -> q4 g32 (mins", 2**-11),
    "hqq-2": (HQQ, partial(q.hqq, bits=2, size=16), "g16 -> q8 g32 (requantised)", 1 / 250),
    "hqq-axis-0": (HQQ, partial(q.hqq, axis=0), "g32 -> q8 g32 (requantised)", 1 / 250),
    "nf4": (BNB, q.nf4, "bitsandbytes nf4 -> q8 g32 (requantised)", 1 / 250),
    "nf4-nested": (BNB, partial(q.nf4, nested=True), "nf4 -> q8 g32 (requantised)", 1 / 250),
    "llm-int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        q.llm_int8,
        "int8 -> q8 g32 (scales rounded to f16, groups beyond ±127 requantised)",
        2**-11,
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else None
    return model


def write(folder: Path, model: Any, settings: dict[str, Any], packer: Any) -> Any:
    """The model's linear layers quantised (not its head), and a model of the values they mean."""
    state, dense = {}, {}
    for name, value in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            state[name] = dense[name] = value
            continue
        tensors, values = packer(value.numpy())
        state |= {name.removesuffix(".weight") + key: t.contiguous() for key, t in tensors.items()}
        dense[name] = torch.from_numpy(values)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": settings}
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    reference = transformers.LlamaForCausalLM(model.config).eval()
    reference.load_state_dict(dense)
    return reference


IDS = tuple(np.random.default_rng(0).integers(3, 101, 40).tolist())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tiny_llama_in_each_scheme(scheme: str, model: Any, tmp_path: Path) -> None:
    settings, packer, note, loss = SCHEMES[scheme]
    reference = write(tmp_path, model, settings, packer)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0].numpy()
    ops = load_provider("cpu")
    exact = load_model(open_checkpoint(tmp_path), ops, weight_format="f32")
    assert_parity(run_tokens(exact, ops, IDS), expected)
    log: list[str] = []
    quantised = load_model(open_checkpoint(tmp_path), ops, log=log.append)
    assert any(note in line for line in log), log
    # Activations are rounded to int8 (that alone gives 0.05), and weights as the note says.
    off = log_softmax(run_tokens(quantised, ops, IDS)) - log_softmax(expected)
    assert np.sqrt(np.mean(off**2)) < 0.1
    checkpoint, weights = open_checkpoint(tmp_path), reference.state_dict()
    for tensor in checkpoint.tensors.values():
        if tensor.matrix is None:
            continue
        values = weights[tensor.name].numpy()
        assert tensor.shape == values.shape
        np.testing.assert_allclose(dequantize(tensor), values, rtol=3e-7, atol=0)
        assert np.abs(packed(to_codes(tensor)) - values).max() <= loss * np.abs(values).max()


@pytest.mark.parametrize("scheme", ["gptq", "awq", "w4a16-asymmetric", "fp8-blocks", "nf4"])
def test_fixes_reorder_rows_that_are_computed(scheme: str, model: Any, tmp_path: Path) -> None:
    settings, packer, _, _ = SCHEMES[scheme]
    write(tmp_path, model, settings, packer)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    rule = Rule("q", name, None, (64, 64), hf_fix=UnpermuteRows(4))
    plain = Rule("q", name, None, (64, 64))
    order = np.arange(64).reshape(4, -1, 2).swapaxes(1, 2).reshape(-1)
    for rules, rows in (([plain], np.arange(64)), ([rule], order)):
        weight = load_weights(checkpoint, rules, CONFIG)["q"]
        whole = packed(to_codes(checkpoint.tensors[name]))
        assert np.array_equal(unpack(weight), whole[rows])


def test_deepseek_as_it_is_published(tmp_path: Path) -> None:
    """FP8 in blocks: rows are reordered, parts taken, and kv_b's keys turned head by head."""
    torch.manual_seed(3)
    sizes = {"q_lora_rank": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    config = transformers.DeepseekV3Config(**SIZES | LATENT | sizes | {"n_group": 4})
    model = transformers.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else None
    model.save_pretrained(tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    settings, packer, _, _ = SCHEMES["fp8-blocks"]
    state = {}
    for name, value in dense.items():
        if "_proj" not in name:
            state[name] = value
            continue
        tensors, values = packer(value.numpy())
        state |= {name.removesuffix(".weight") + key: t.contiguous() for key, t in tensors.items()}
        dense[name] = torch.from_numpy(values)
    save_file(dense, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").float().eval()
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0].numpy()
    (tmp_path / "fp8").mkdir()
    save_file(state, tmp_path / "fp8" / "model.safetensors")
    text = json.loads((tmp_path / "dense" / "config.json").read_text())
    text["quantization_config"] = settings
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(text))
    ops, log = load_provider("cpu"), list[str]()
    exact = load_model(open_checkpoint(tmp_path / "fp8"), ops, weight_format="f32")
    assert_parity(run_tokens(exact, ops, IDS), expected)
    quantised = load_model(open_checkpoint(tmp_path / "fp8"), ops, log=log.append)
    assert any("FP8 32x48 -> f32 (transposed): 3" in line for line in log), log
    # No distance is asked for: rounded activations turn near ties of the random router.
    assert np.isfinite(run_tokens(quantised, ops, IDS)).all()


def test_experts_lie_one_after_the_other(tmp_path: Path) -> None:
    """gpt-oss: [experts, rows, K / 32, 16] is a matrix of experts x rows rows."""
    oracle = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 10, 2, 16), np.uint8))
    scales = torch.from_numpy(rng.integers(110, 130, (3, 10, 2), np.uint8))
    tensors = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    checkpoint = folder_of(tmp_path, tensors, {"quant_method": "mxfp4"})
    tensor = checkpoint.tensors["mlp.experts.down_proj"]
    assert tensor.shape == (3, 10, 64) and kind_of(tensor) == ("q5", "MXFP4 -> q5 g32")
    expected = oracle(blocks, scales, dtype=torch.float32).transpose(1, 2).reshape(30, 64).numpy()
    assert np.array_equal(dequantize(tensor), expected)
    assert np.array_equal(packed(to_codes(tensor, 7, 23)), expected[7:23])
    # The second expert, and its even rows (gate and up alternate). Unquantised, they lie transposed.
    rules = [
        Rule("x", tensor.name, None, (10, 64), hf_part=Part(tensor.shape, 10), hf_transposed=True),
        Rule("even", tensor.name, None, (5, 64), hf_part=Part(tensor.shape, 10, 1, 2)),
    ]
    state = load_weights(checkpoint, rules, CONFIG)
    assert np.array_equal(unpack(state["x"]), expected[10:20])
    assert np.array_equal(unpack(state["even"]), expected[10:20:2])


def folder_of(folder: Path, tensors: dict[str, Any], settings: Any) -> Checkpoint:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def matrix(scheme: str, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One matrix X of 32 x 64 and its settings; `changed` replaces or (None) removes tensors by
    their ending, with _ for each dot."""
    settings, packer, _, _ = SCHEMES[scheme]
    w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    tensors = dict(packer(w)[0])
    for ending, value in changed.items():
        key = next(key for key in tensors if key.replace(".", "_") == ending)
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key])
    return {"X" + key: t for key, t in tensors.items()}, settings


def nan(t: Any) -> Any:
    """The first number is not one."""
    t = t.clone()
    if t.dtype == torch.uint8:
        t.view(-1)[0] = 255
    else:
        t.view(-1)[0] = float("nan")
    return t


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "eetq"}, "is quantised with eetq, which is not supported; use a model w"),
        ({}, "is quantised with None, which is not supported"),
        ("gptq", "is quantised with None, which is not supported"),
        ({"quant_method": ["gptq"]}, "quantised with ['gptq'], which"),
        (GPTQ | {"bits": 3}, "gptq and bits = 3, and only 2 or 4 or 8 is supported"),
        (GPTQ | {"bits": True}, "gptq and bits = True"),
        (GPTQ | {"group_size": 0}, "group_size = 0, which must be a whole number from 1 up"),
        (GPTQ | {"group_size": "32"}, "group_size = 32, which must be a whole number"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = marlin, and only gptq or"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "gptq and dynamic ="),
        (AWQ | {"version": "gemv"}, "awq and version = gemv, and only gemm"),
        (CT | {"format": "marlin-24"}, "format = marlin-24, and only dense or pack-quantized"),
        (CT | {"transform_config": {"a": 1}}, "transform_config = {'a': 1}, and only null"),
        (CT | {"sparsity_config": {"format": "sparse-bitmask"}}, "format = sparse-bitmask"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo = W4A8_AWQ"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size = 128"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "columns = 0, which must be"),
    ],
)
def test_settings_that_are_not_supported(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        folder_of(tmp_path, {"x": torch.zeros(1)}, settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def cut(t: Any) -> Any:
    return t[:-1].contiguous()


@pytest.mark.parametrize(
    ("scheme", "changed", "message"),
    [
        ("gptq", {"_scales": None}, "lacks the tensor X.scales, and it is quantised with gptq"),
        ("gptq", {"_qzeros": cut}, "Tensor X.qzeros of"),
        ("gptq", {"_g_idx": cut}, "needs I32 [64] there"),
        ("gptq", {"_qweight": lambda t: t.reshape(-1)}, "Tensor X.scales of"),
        ("awq", {"_qzeros": None}, "lacks the tensor X.qzeros"),
        (
            "awq",
            {"_scales": lambda t: t.T},
            "is F16 [32, 2], and awq needs F32 or F16 or BF16 [2, 32] there",
        ),
        ("w4a16", {"_weight_shape": None}, "lacks the tensor X.weight_shape"),
        ("w4a16", {"_weight_packed": cut}, "which is no packing of a matrix [32, 64]"),
        ("w4a16", {"_weight_shape": lambda t: -t}, "no packing of a matrix [-32, -64]"),
        ("w4a16", {"_weight_scale": cut}, "does not fit the rows of a matrix [32, 64]"),
        ("w4a16-asymmetric", {"_weight_zero_point": cut}, "does not fit 2 scales for each of"),
        ("w8a8", {"_weight_scale": None}, "lacks the tensor X.weight_scale"),
        ("fp8-blocks", {"_weight_scale_inv": None}, "lacks the tensor X.weight_scale"),
        ("fp8-blocks", {"_weight_scale_inv": lambda t: t[:, :1, None]}, "fits neither the rows"),
        ("nvfp4", {"_weight_scale": None}, "lacks the tensor X.weight_scale"),
        ("nvfp4", {"_weight_global_scale": lambda t: t.repeat(2)}, "must hold one number"),
        ("nvfp4-modelopt", {"_weight": cut}, "Tensor X.weight_scale of"),
        ("mxfp4", {"_weight_scales": cut}, "and mxfp4 needs U8 [32, 2] there"),
        ("mxfp4", {"_weight_blocks": lambda t: t[..., :8]}, "MXFP4 blocks have 16 bytes"),
        ("nf4", {"_weight_absmax": cut}, "Tensor X.weight.absmax of"),
        ("nf4", {"_weight_quant_map": None}, "lacks the tensor X.weight.quant_map"),
        ("nf4", {"_weight_quant_state_bitsandbytes__nf4": cut}, "does not describe a matrix"),
        ("nf4-nested", {"_weight_nested_absmax": None}, "lacks the tensor X.weight.nested_absmax"),
        ("llm-int8", {"_SCB": cut}, "Tensor X.SCB of"),
        (
            "hqq",
            {"_W_q": cut},
            "no packing of a matrix [32, 64] in 4 bits and groups of 32 along axis",
        ),
        ("hqq", {"_scale": cut}, "Tensor X.scale of"),
        ("hqq", {"_axis": None}, "lacks the tensor X.axis"),
        ("hqq", {"_group_size": lambda t: t * 0}, "groups of 0 along axis 1"),
        ("hqq", {"_nbits": lambda t: -t}, "no packing of a matrix [32, 64] in"),
        ("hqq", {"_shape": lambda t: -t}, "no packing of a matrix [-32, -64]"),
        ("sparse", {"_bitmask": cut}, "Tensor X.bitmask of"),
        ("sparse", {"_compressed": None}, "lacks the tensor X.compressed"),
    ],
)
def test_parts_that_do_not_fit(
    scheme: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        folder_of(tmp_path, *matrix(scheme, **changed))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "ending", "change", "message"),
    [
        ("gptq", "_scales", nan, "X.scales holds scales that are not finite"),
        ("gptq-act-order", "_scales", nan, "X.scales holds scales that are not finite"),
        ("gptq", "_g_idx", lambda t: t + 1, "X.g_idx names the group 2, and there are 2"),
        ("awq", "_scales", nan, "X.scales holds scales that are not finite"),
        ("w4a16", "_weight_scale", nan, "X.weight_scale holds scales that are not finite"),
        ("w8a8", "_weight_scale", nan, "X.weight_scale holds scales that are not finite"),
        ("w8a8-fp8", "_weight_scale", nan, "X.weight_scale holds scales that are not finite"),
        ("fp8-blocks", "_weight_scale_inv", nan, "X.weight_scale_inv holds scales that are not"),
        ("nvfp4", "_weight_global_scale", nan, "X.weight_global_scale holds scales that are not"),
        ("nvfp4", "_weight_global_scale", lambda t: t * 0, "X.weight_global_scale holds scales"),
        ("mxfp4", "_weight_scales", nan, "X.weight_scales holds scales that are not finite"),
        ("nf4", "_weight_absmax", nan, "X.weight.absmax holds scales that are not finite"),
        ("nf4-nested", "_weight_nested_absmax", nan, "X.weight.absmax holds scales that are not"),
        ("hqq", "_scale", nan, "X.scale holds scales that are not finite"),
        ("hqq", "_zero", nan, "X.zero holds scales that are not finite"),
        ("llm-int8", "_SCB", nan, "X.SCB holds scales that are not finite"),
        ("sparse", "_bitmask", lambda t: t | 1, "X.bitmask of"),
    ],
)
def test_parts_that_hold_nonsense(
    scheme: str, ending: str, change: Any, message: str, tmp_path: Path
) -> None:
    tensors, settings = matrix(scheme, **{ending: change})
    (tensor,) = folder_of(tmp_path, tensors, settings).tensors.values()
    for function in (to_codes, dequantize):
        with pytest.raises(ModelError) as caught:
            function(tensor)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_inputs_must_be_a_multiple_of_32(tmp_path: Path) -> None:
    tensors, settings = matrix("w8a8", _weight=lambda t: t[:, :40])
    with pytest.raises(ModelError, match=r"X\.weight has 40 inputs, and quantised matrices need"):
        folder_of(tmp_path, tensors, settings)


def test_both_quantised_and_not(tmp_path: Path) -> None:
    tensors, settings = matrix("awq")
    with pytest.raises(ModelError, match=r"holds X\.weight both quantised and not"):
        folder_of(tmp_path, tensors | {"X.weight": torch.zeros(32, 64)}, settings)


def test_zero_biases_of_gptq_tools_are_nothing(tmp_path: Path) -> None:
    tensors, settings = matrix("gptq")
    rules = [Rule("x", "X.weight", None, (32, 64))]
    checkpoint = folder_of(tmp_path, tensors | {"X.bias": torch.zeros(32)}, settings)
    assert list(load_weights(checkpoint, rules, CONFIG)) == ["x"]
    checkpoint = folder_of(tmp_path, tensors | {"X.bias": torch.ones(32)}, settings)
    with pytest.raises(ModelError, match=r"holds the bias X\.bias"):
        load_weights(checkpoint, rules, CONFIG)
