"""Schemes against the libraries that define them, where those are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elinvar.weights.quants import dequantize
from test_schemes import BNB, CT, HQQ, folder_of

torch = pytest.importorskip("torch")


def weights(n: int = 48, k: int = 128) -> Any:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((n, k)).astype(np.float32))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bits(kind: str, nested: bool, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    packed, state = bnb.quantize_4bit(weights(), quant_type=kind, compress_statistics=nested)
    parts = {f"X.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    checkpoint = folder_of(tmp_path, parts | {"X.weight": packed}, BNB)
    expected = bnb.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(dequantize(checkpoint.tensors["X.weight"]), expected, rtol=3e-7)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_compressed_tensors_packed(
    bits: int, symmetric: bool, group: int | None, tmp_path: Path
) -> None:
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    strategy = "group" if group else "channel"
    args = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    w, low = weights(), -(1 << (bits - 1))
    scale = (w.reshape(48, -1, group or 128).abs().amax(-1) / -low).bfloat16().float()
    zero = torch.zeros_like(scale, dtype=torch.int8) if symmetric else torch.full_like(scale, 3)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = library.BaseCompressor.get_value_from_registry("pack-quantized")
    parts = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(parts), scheme)["weight"]
    settings = CT | {"format": "pack-quantized"}
    checkpoint = folder_of(tmp_path, {f"X.{key}": t for key, t in parts.items()}, settings)
    found = dequantize(checkpoint.tensors["X.weight"])
    np.testing.assert_allclose(found, expected.float().numpy(), rtol=3e-7)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(bits: int, axis: int, tmp_path: Path) -> None:
    library = pytest.importorskip("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=16 if axis == 0 else 64, axis=axis)
    linear = torch.nn.Linear(128, 48, bias=False)
    linear.weight.data = weights()
    layer = library.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    parts = {f"X.{key}": t for key, t in layer.state_dict().items() if t is not None}
    checkpoint = folder_of(tmp_path, parts, HQQ)
    assert list(checkpoint.tensors) == ["X.weight"]
    expected = layer.dequantize().numpy()
    np.testing.assert_allclose(dequantize(checkpoint.tensors["X.weight"]), expected, rtol=3e-7)
