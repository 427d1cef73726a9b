"""GGML blocks against the reference package, and the codes that are packed from them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.errors import ModelError
from elinvar.ops.layout import pack_float, pack_q4, pack_q5, pack_q8, unpack
from elinvar.weights.quants import SUPPORTED, Codes, dequantize, kind_of, requantize, to_codes
from elinvar.weights.tensor import BLOCKS, HostTensor
from model_files import host_tensor, random_blocks

EXACT = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
EXACT |= {"TQ1_0", "TQ2_0", "MXFP4"}
ROUNDED = {"IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ4_XS"}
MINS = {"Q4_K": ("q4", 15), "Q5_K": ("q5", 31), "IQ1_S": ("q4", 2)}
REQUANTISED = {"Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_XS", "IQ2_S"}


def reference(tensor: HostTensor) -> np.ndarray:
    values = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.dtype])
    return values.reshape(tensor.shape)


def packed(codes: Codes) -> np.ndarray:
    """What the kernels will see: [N, K] float32."""
    if codes.kind == "q4":
        return unpack(pack_q4(codes.values, codes.scales, codes.mins))
    if codes.kind == "q5":
        return unpack(pack_q5(codes.values, codes.scales, codes.mins))
    if codes.kind == "q8":
        return unpack(pack_q8(codes.values, codes.scales))
    return unpack(pack_float(codes.kind, codes.values))


def test_every_type_of_the_issue_is_supported() -> None:
    assert {*EXACT, *ROUNDED, *MINS, *REQUANTISED} == set(SUPPORTED)


@pytest.mark.parametrize("dtype", SUPPORTED)
@pytest.mark.parametrize("rows", [1, 17, 97])
def test_dequantize_equals_the_reference(dtype: str, rows: int) -> None:
    tensor = host_tensor(dtype, rows, 768, seed=rows)
    assert np.array_equal(dequantize(tensor), reference(tensor))
    part = dequantize(tensor, rows // 2, rows)
    assert np.array_equal(part, reference(tensor)[rows // 2 :])


@pytest.mark.parametrize("dtype", [d for d in SUPPORTED if d not in ("F32", "F16", "BF16")])
def test_dequantize_any_bits(dtype: str) -> None:
    """Also infinities, NaNs and subnormals in the scales."""
    size = 768 // BLOCKS[dtype][0] * BLOCKS[dtype][1]
    raw = np.random.default_rng(1).integers(0, 256, (33, size), np.uint8)
    tensor = HostTensor("w", (33, 768), dtype, raw)
    with np.errstate(all="ignore"):
        expected = reference(tensor)
    assert np.array_equal(dequantize(tensor), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", sorted(EXACT))
def test_exact_types_keep_every_value(dtype: str) -> None:
    tensor = host_tensor(dtype, 33, 256)
    assert np.array_equal(packed(to_codes(tensor)), reference(tensor))
    assert "(" not in kind_of(tensor)[1]


@pytest.mark.parametrize("dtype", sorted(ROUNDED))
def test_types_whose_scales_are_rounded(dtype: str) -> None:
    tensor = host_tensor(dtype, 33, 512)
    codes, expected = to_codes(tensor), reference(tensor)
    assert kind_of(tensor) == ("q8", f"{dtype} -> q8 g32 (scales rounded to f16)")
    largest = np.abs(codes.values.astype(np.float32))
    bound = np.abs(expected) * 2.0**-11 + largest * 2.0**-24
    assert (np.abs(packed(codes) - expected) <= bound).all()


@pytest.mark.parametrize("dtype", MINS)
def test_types_with_mins_round_only_their_factors(dtype: str) -> None:
    kind, largest = MINS[dtype]
    tensor = host_tensor(dtype, 33, 512)
    assert "(scales and mins rounded to f16)" in kind_of(tensor)[1]
    codes, expected = to_codes(tensor), reference(tensor)
    assert codes.kind == kind and codes.values.max() == largest
    # Half a unit in the last place of each f16 factor.
    scale, low = (
        np.repeat(np.abs(f.astype(np.float32)), 32, 1) for f in (codes.scales, codes.mins)
    )
    bound = (largest * scale + low) * 2.0**-11 + largest * 2.0**-24
    assert (np.abs(packed(codes) - expected) <= bound).all()


@pytest.mark.parametrize("dtype", sorted(REQUANTISED))
def test_requantised_types_are_within_half_a_step(dtype: str) -> None:
    tensor = host_tensor(dtype, 33, 512)
    codes, expected = to_codes(tensor), reference(tensor)
    assert codes.kind == "q8" and kind_of(tensor)[1] == f"{dtype} -> q8 g32 (requantised)"
    step = np.repeat(codes.scales.astype(np.float32), 32, axis=1)
    assert (np.abs(packed(codes) - expected) <= step * 0.5001).all()
    # The step is no larger than it must be.
    amax = np.abs(expected).reshape(33, -1, 32).max(-1)
    assert (codes.scales.astype(np.float32) <= amax / 127 * (1 + 2**-10) + 2.0**-24).all()


@pytest.mark.parametrize("dtype", SUPPORTED)
def test_chunks_of_rows_give_the_same_codes(dtype: str) -> None:
    tensor = host_tensor(dtype, 40, 256)
    whole, parts = to_codes(tensor), [to_codes(tensor, 0, 16), to_codes(tensor, 16, 40)]
    for field in ("values", "scales", "mins"):
        if getattr(whole, field) is not None:
            joined = np.concatenate([getattr(part, field) for part in parts])
            assert np.array_equal(joined, getattr(whole, field))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-45, 20))
def test_requantize_never_leaves_the_range(seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    groups = (rng.standard_normal((8, 32)) * 2.0**exponent).astype(np.float32)
    groups[0] = 0
    groups[1, :31] = 0
    codes, scales = requantize(groups)
    steps = scales.astype(np.float32)[:, None]
    assert np.abs(codes.astype(int)).max() <= 127 and not codes[0].any() and scales[0] == 0
    assert (np.abs(codes * steps - groups) <= np.maximum(steps * 0.5001, 2.0**-24)).all()


def test_subnormal_scales() -> None:
    groups = np.full((1, 32), 2.0**-24, np.float32)  # the smallest f16 value, as a weight
    codes, scales = requantize(groups)
    assert np.array_equal(codes * scales.astype(np.float32), groups)
    codes, scales = requantize(groups * np.float32(2.0**-20))  # far below it
    assert np.isfinite(scales).all() and not codes.any()


def test_q8_0_with_minus_128_is_requantised_where_it_occurs() -> None:
    raw = random_blocks("Q8_0", 4, 64)
    raw[1, 2 + 5] = 128
    tensor = HostTensor("w", (4, 64), "Q8_0", raw)
    codes, expected = to_codes(tensor), reference(tensor)
    assert codes.values.min() >= -127
    changed = packed(codes) != expected
    assert changed[1, :32].any() and changed.sum() == changed[1, :32].sum()
    assert np.abs(packed(codes) - expected).max() <= abs(codes.scales[1, 0]) * 0.51


@pytest.mark.parametrize(
    "dtype", [d for d in SUPPORTED if d not in ("F32", "F16", "BF16", "IQ1_M", "MXFP4")]
)
def test_scales_that_are_not_finite_are_a_model_error(dtype: str) -> None:
    size = 256 // BLOCKS[dtype][0] * BLOCKS[dtype][1]
    tensor = HostTensor("blk.0.w", (2, 256), dtype, np.full((2, size), 0x7C, np.uint8))
    tensor.data[:, 1::2] = 0x7C
    tensor.data[:, 0::2] = 0x00
    with pytest.raises(ModelError, match=r"blk\.0\.w holds scales that are not finite"):
        to_codes(tensor)


def test_a_block_exponent_beyond_f16_is_a_model_error() -> None:
    tensor = HostTensor("w", (2, 32), "MXFP4", np.full((2, 17), 255, np.uint8))
    with pytest.raises(ModelError, match="w holds scales that are not finite"):
        to_codes(tensor)


def test_types_that_cannot_be_loaded() -> None:
    tensor = HostTensor("ids", (4,), "I64", np.zeros((1, 32), np.uint8))
    for function in (dequantize, kind_of, to_codes):
        with pytest.raises(ModelError, match="ids has type I64, which is not supported; use"):
            function(tensor)
