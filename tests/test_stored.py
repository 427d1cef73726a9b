"""Formats of files that products of a provider take as they are: kept so, and otherwise not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.base.errors import ModelError
from elinvar.ops.layout import (
    WeightKind,
    join,
    pack_stored,
    packed_bytes,
    stored_columns,
    unpack,
    unpack_stored,
)
from elinvar.ops.stored import STORED
from elinvar.ops.triton.sizes import TAKEN
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.fixes import TransposeHeads, UnpermuteRows
from elinvar.weights.load import load_weights, packed_entries
from elinvar.weights.quants import dequantize
from elinvar.weights.rules import Cut, Part, Rule
from elinvar.weights.shards import unshard
from engines import random_parts
from model_files import host_tensor, write_gguf
from test_rules import CONFIG

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (40, 160), (48, 256)])
def test_parts_come_back(kind: WeightKind, n: int, k: int) -> None:
    """And cut, and joined again."""
    parts = random_parts(np.random.default_rng(n), kind, n, k)
    w = pack_stored(kind, parts)
    assert w.shape == (n, k) and w.nbytes == packed_bytes(kind, (n, k))
    assert same(unpack_stored(w), parts)
    if k == 256:
        halves = [pack_stored(kind, stored_columns(kind, parts, at, at + 128)) for at in (0, 128)]
        assert np.array_equal(unpack(halves[1]), unpack(w)[:, 128:])
        assert np.array_equal(join(halves, 1).data, w.data)
        assert np.array_equal(unpack(join([w, w], 0)), np.concatenate([unpack(w)] * 2))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", STORED)
def test_what_codes_stand_for(kind: WeightKind) -> None:
    """By the formats' definitions, one code after the other."""
    n, k = 20, 160
    parts = random_parts(np.random.default_rng(0), kind, n, k)
    found = unpack(pack_stored(kind, parts))
    for i, j in [(0, 0), (3, 17), (15, 127), (16, 128), (19, 159)]:
        if kind.endswith("fp4"):
            value = np.float32(E2M1[parts["codes"][i, j // 2] >> 4 * (j % 2) & 15])
            byte = int(parts["scales"][i, j // (32 if kind == "mxfp4" else 16)])
            value *= np.float32(2.0 ** (byte - 127) if kind == "mxfp4" else e4m3(byte))
        else:
            code = int(parts["codes"][i, j])
            value = np.float32((code ^ 128) - 128 if kind == "int8" else e4m3(code))
        if kind == "fp8-blocks":
            value *= parts["scales"][i // 16, j // 128]
        if "factors" in parts:
            value *= parts["factors"][i, 0]
        assert found[i, j] == value


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


# Matrices as files hold them.
torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

import quantisers as q  # noqa: E402 (needs torch)

CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {**CT, "config_groups": {"all": {"weights": INT8, "input_activations": INT8}}}


def fp8_blocks(w: q.F32) -> q.Packed:
    return q.fp8(w, (128, 128), ".weight_scale_inv")


FORMS: dict[str, tuple[dict[str, Any], Any, WeightKind]] = {
    "fp8-tensor": (CT, lambda w: q.fp8(w, None), "fp8"),
    "fp8-channel": (CT, lambda w: q.fp8(w, (1, w.shape[1])), "fp8"),
    "fp8-blocks": (BLOCKS, fp8_blocks, "fp8-blocks"),
    "nvfp4": (CT, lambda w: q.nvfp4(w, True), "nvfp4"),
    "nvfp4-modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda w: q.nvfp4(w, False),
        "nvfp4",
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, q.mxfp4, "mxfp4"),
    "w8a8": (W8A8, q.int8, "int8"),
    "sparse-fp8": (CT, lambda w: q.sparse24(w, "fp8"), "fp8"),
}


def folder_of(folder: Path, settings: Any, tensors: dict[str, Any]) -> Checkpoint:
    save_file({f"X{n}": t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def matrix(n: int = 256, k: int = 256) -> q.F32:
    return np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)


def loaded(checkpoint: Checkpoint, *rules: Rule, **options: Any) -> Any:
    state = load_weights(checkpoint, rules, CONFIG, stored=TAKEN, **options)
    kinds = {w.name: w.kind for w in packed_entries(checkpoint, rules, CONFIG, stored=TAKEN)}
    if not options:
        assert kinds == {name: w.kind for name, w in state.items()}
    return state[rules[0].name]


@pytest.mark.parametrize("form", FORMS)
def test_a_format_is_kept(form: str, tmp_path: Path) -> None:
    """Codes are those of the file, of any of its rows: -128 too."""
    settings, packer, kind = FORMS[form]
    tensors, values = packer(matrix())
    checkpoint = folder_of(tmp_path, settings, tensors)
    (tensor,) = checkpoint.tensors.values()
    plain, log = Rule("x", tensor.name, None, (256, 256)), list[str]()
    kept = load_weights(checkpoint, [plain], CONFIG, stored=TAKEN, log=log.append)["x"]
    assert kept.kind == kind and log == [f"{tensor.dtype} -> {kind} (as it is): 1 matrix"]
    np.testing.assert_allclose(unpack(kept), values, rtol=3e-7, atol=0)
    np.testing.assert_allclose(unpack(kept), dequantize(tensor), rtol=3e-7, atol=0)
    order = np.arange(256).reshape(4, -1, 2).swapaxes(1, 2).reshape(-1)
    turned = loaded(checkpoint, Rule("x", tensor.name, None, (256, 256), hf_fix=UnpermuteRows(4)))
    assert turned.kind == kind and np.array_equal(unpack(turned), unpack(kept)[order])
    for axis in (0, 1):
        halves = [[Rule(**rule(plain), cut=Cut(axis, at, at + 128))] for at in (0, 128)]
        states = [{"x": loaded(checkpoint, *one)} for one in halves]
        assert np.array_equal(unshard(states, halves, 1)["x"].data, kept.data)
    assert loaded(checkpoint, plain, weight_format="f32").kind == "f32"
    assert load_weights(checkpoint, [plain], CONFIG)["x"].kind in ("q8", "q5")


def rule(of: Rule) -> dict[str, Any]:
    return {name: getattr(of, name) for name in ("name", "hf", "gguf", "shape")}


def test_mxfp4_of_gguf(tmp_path: Path) -> None:
    stored = host_tensor("MXFP4", 24, 256)
    path = write_gguf(tmp_path / "x.gguf", {"x": ("MXFP4", stored.data)})
    checkpoint = open_checkpoint(path)
    w = loaded(checkpoint, Rule("x", None, "x", (24, 256)))
    assert w.kind == "mxfp4" and np.array_equal(unpack(w), dequantize(stored))


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, "fp8-blocks"),
        ({"hf_part": Part((256, 256), 128), "shape": (96, 256)}, "fp8-blocks"),
        # Rows 120 to 135 are a panel, and of two blocks.
        ({"hf_part": Part((256, 256), 8), "shape": (160, 256)}, "q8"),
        ({"shape": (40, 256), "hf_part": Part((256, 256))}, "q8"),
        ({"cut": Cut(0, 8, 168)}, "q8"),
        ({"cut": Cut(1, 0, 64)}, "q8"),
        (
            {"hf_fix": TransposeHeads(2), "shape": (512, 128), "hf_part": Part((256, 256))},
            "f32",
        ),
    ],
)
def test_blocks_are_kept_whole(changed: dict[str, Any], kind: str, tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, BLOCKS, fp8_blocks(matrix())[0])
    one = Rule(**{"name": "x", "hf": "X.weight", "gguf": None, "shape": (256, 256)} | changed)
    assert loaded(checkpoint, one).kind == kind


@pytest.mark.parametrize(
    ("settings", "packer", "shape", "kind"),
    [
        (BLOCKS | {"weight_block_size": [64, 64]}, lambda w: q.fp8(w, (64, 64)), (256, 256), "q8"),
        (BLOCKS, fp8_blocks, (256, 96), "fp8"),  # a scale a row, in effect
        (CT, q.int8, (32, 64), "q8"),  # activations are not int8
        ({**CT, "config_groups": {"all": {"weights": INT8}}}, q.int8, (32, 64), "q8"),
        (W8A8, lambda w: q.packed_ints(w, 8, -1), (32, 64), "q8"),
    ],
)
def test_what_no_product_takes_becomes_what_it_always_does(
    settings: Any, packer: Any, shape: tuple[int, int], kind: str, tmp_path: Path
) -> None:
    checkpoint = folder_of(tmp_path, settings, packer(matrix(*shape))[0])
    assert loaded(checkpoint, Rule("x", "X.weight", None, shape)).kind == kind


@pytest.mark.parametrize(
    ("form", "ending", "message"),
    [
        ("fp8-tensor", ".weight", "X.weight holds numbers that are not finite"),
        ("fp8-blocks", ".weight_scale_inv", "X.weight_scale_inv holds scales that are not finite"),
        ("nvfp4", ".weight_scale", "X.weight_scale holds scales that are not finite"),
        ("nvfp4", ".weight_global_scale", "X.weight_global_scale holds scales that are not"),
        ("mxfp4", ".weight_scales", "X.weight_scales holds scales that are not finite"),
        ("w8a8", ".weight_scale", "X.weight_scale holds scales that are not finite"),
    ],
)
def test_what_is_not_finite_is_refused(
    form: str, ending: str, message: str, tmp_path: Path
) -> None:
    settings, packer, _ = FORMS[form]
    tensors, _ = packer(matrix(32, 160))
    whole = tensors[ending].reshape(-1)
    whole.view(torch.uint8)[: whole.element_size()] = 255
    checkpoint = folder_of(tmp_path, settings, tensors)
    (tensor,) = checkpoint.tensors.values()
    with pytest.raises(ModelError) as caught:
        loaded(checkpoint, Rule("x", tensor.name, None, (32, 160)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_each_device_has_its_packed_file(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, BLOCKS, fp8_blocks(matrix())[0])
    rules = [Rule("x", "X.weight", None, (256, 256))]

    def kind(**options: Any) -> str:
        log: list[str] = []
        more = {"cache_dir": tmp_path, "log": log.append, **options}
        found = load_weights(checkpoint, rules, CONFIG, **more)["x"]
        assert found.kind in ("q8", "fp8-blocks")
        return f"{found.kind} {log[-1].partition(' ')[0]}"

    assert [kind(), kind(stored=TAKEN), kind(), kind(stored=TAKEN), kind(stored={"mxfp4"})] == [
        *("q8 Wrote", "fp8-blocks Wrote", "q8 Mapped", "fp8-blocks Mapped", "q8 Mapped")
    ]
    names = sorted(path.name.partition("-auto")[2] for path in (tmp_path / "packed").iterdir())
    assert names == ["-fp8-blocks-v3.pack", "-v3.pack"]
