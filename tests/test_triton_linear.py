"""Products on GPUs, under Triton's interpreter: close to f64, and a row has its bits beside any others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from elinvar.base.config import Activation
from elinvar.base.errors import ElinvarError
from elinvar.ops.ref_rows import gated_product
from elinvar.ops.triton import gather, linear, matrices, rows, tuned
from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.matrices import Matrix
from triton_matrices import KINDS, made

SMALL = Config(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=2)
SPANS = ((0, 1), (16, 17), (32, 33), (4, 6), (5, 12), (7, 24))
"""Of 33 rows: some alone, 2, 7 and 17 of them."""
BF16 = 2.0**-7
"""What the rounding of numbers may change in their sum, of the largest one."""


def inputs(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)


def small(kind: str, n: int, k: int, **other: int) -> tuple[Matrix, NDArray[np.float64]]:
    w, full = made(kind, n, k)
    return replace(w, tuned=replace(SMALL, **other)), full


def close(y: torch.Tensor, expected: NDArray[np.float64], rounding: float = BF16) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y.double().numpy() / scale, expected / scale, rtol=0, atol=rounding)


def same_alone(run: object, x: torch.Tensor, *spans: tuple[int, int]) -> None:
    assert callable(run)
    whole = run(x)
    for first, last in spans:
        assert torch.equal(run(x[first:last]), whole[first:last]), (first, last)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    """A product is that with the numbers a matrix stands for, in the dtype of the inputs, and a row
    has its bits beside any others."""
    w, full = small(kind, 75, 160)
    exact = kind == "f32" or w.factors is not None
    rounded = full if exact else torch.from_numpy(full).float().bfloat16().double().numpy()
    bias = torch.randn(75)
    x = inputs(33, 160)
    y = linear.linear(x, [w], bias, torch.float32)
    assert y.dtype == torch.float32
    close(y, x.double().numpy() @ rounded.T + bias.double().numpy(), 1e-6)
    same_alone(lambda some: linear.linear(some, [w], bias, torch.float32), x, *SPANS)


@pytest.mark.parametrize("kind", ["bf16", "q4"])
def test_parts_are_added_in_one_order(kind: str) -> None:
    """By one program where there are many rows, by one each where there are few."""
    w, full = small(kind, 75, 288, block_k=64, parts=2)
    x = inputs(33, 288)
    close(linear.linear(x, [w]), x.double().numpy() @ full.T)
    same_alone(lambda some: linear.linear(some, [w]), x, *SPANS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_product_is_that_of_the_numbers_it_stands_for(kind: str) -> None:
    """To the bit, but where factors come after the sum; and rows of it are those numbers."""
    w, full = small(kind, 33, 160, block_k=64)
    numbers = gather.unpack(w)
    np.testing.assert_allclose(
        numbers.numpy(), full, rtol=BF16 if kind == "f16" else 1e-6, atol=1e-7
    )
    x = inputs(7, 160)
    floats = numbers if kind == "f32" else numbers.bfloat16()
    plain = replace(matrices.dense(floats), tuned=w.config)
    y, expected = linear.linear(x, [w]), linear.linear(x, [plain])
    if w.factors is None:
        assert torch.equal(y, expected)
    else:
        close(y, expected.double().numpy())


def test_dtypes() -> None:
    for dtype, kinds in ((torch.float32, ("bf16", "q4", "f32")), (torch.float16, ("f16", "q8"))):
        for kind in kinds:
            w, full = made(kind, 75, 160, dtype)
            x = inputs(7, 160, dtype)
            y = linear.linear(x, [w])
            assert y.dtype == dtype
            rounding = 1e-6 if dtype == torch.float32 else 2.0**-10
            close(y, x.double().numpy() @ full.T, rounding)


def test_side_by_side() -> None:
    """Joined or not, of one kind or of several: the same numbers at the same places."""
    (a, _), (b, _), (c, _) = (made("q4", n, 128, seed=n) for n in (64, 31, 17))
    d, _ = made("q8", 33, 128)
    x, bias = inputs(7, 128), torch.randn(112)
    joined = matrices.join([a, b, c])
    assert joined is not None and joined.shape == (112, 128)
    assert matrices.join([a, d]) is None
    y = linear.linear(x, [joined], bias)
    assert torch.equal(linear.linear(x, [a, b, c], bias), y)
    y = linear.linear(x, [a, d])
    assert torch.equal(y[:, 64:], linear.linear(x, [d]))
    assert linear.linear(x[:0], [a]).shape == (0, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_join_keeps_each_matrix(kind: str) -> None:
    first = 32 if kind == "fp8-blocks" else 19
    parts = [made(kind, n, 160, seed=n) for n in (first, 14)]
    joined = matrices.join([w for w, _ in parts])
    assert joined is not None
    expected = torch.cat([gather.unpack(w) for w, _ in parts])
    assert torch.equal(gather.unpack(joined), expected)


ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu2", "swiglu_oai")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: Activation) -> None:
    (gate, full_gate), (up, full_up) = (made("q4", 33, 96, seed=seed) for seed in (1, 2))
    both = matrices.join([gate, up])
    assert both is not None
    both = replace(both, tuned=SMALL)
    x = inputs(17, 96) / 4
    y = linear.gated_linear(x, both, activation)
    g, u = (x.double().numpy() @ full.T for full in (full_gate, full_up))
    close(y, gated_product(g.astype(np.float32), u.astype(np.float32), activation), 2 * BF16)
    assert torch.equal(y, rows.gated(linear.linear(x, [both]), activation, x.dtype))
    same_alone(lambda some: linear.gated_linear(some, both, activation), x, (0, 1), (3, 9))


def test_gated_in_parts() -> None:
    w, _ = small("q8", 150, 288, block_k=64, parts=2)
    x = inputs(33, 288)
    same_alone(lambda some: linear.gated_linear(some, w, "silu"), x, (0, 1), (3, 9))
    few = linear.gated_linear(x[:7], w, "silu")
    assert torch.equal(few, rows.gated(linear.linear(x[:7], [w]), "silu", x.dtype))


@pytest.mark.parametrize("kind", ["bf16", "q4"])
def test_heads(kind: str) -> None:
    w, full = small(kind, 3 * 48, 64)
    x = inputs(17, 3 * 64)
    y = linear.head_linear(x, w, 3)
    heads = x.double().numpy().reshape(17, 3, 64)
    expected = np.einsum("thk,hnk->thn", heads, full.reshape(3, 48, 64)).reshape(17, -1)
    close(y, expected)
    same_alone(lambda some: linear.head_linear(some, w, 3), x, (0, 1), (3, 9))


def test_int8_by_int8() -> None:
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(-127, 128, (75, 160)).astype(np.int8))
    scales = torch.from_numpy(rng.uniform(0.001, 0.002, 75).astype(np.float32))
    w = replace(matrices.int8(codes, scales), tuned=SMALL)

    def run(x: torch.Tensor) -> torch.Tensor:
        return linear.quantised_linear(*gather.quantise_rows(x), w, torch.bfloat16)

    x = inputs(17, 160)
    x[3] = 0
    x_codes, x_scales = gather.quantise_rows(x)
    largest = x.float().abs().amax(1)
    assert torch.equal(x_scales, largest / 127)
    halves = (x_codes.double() * x_scales[:, None] - x.double()).abs() <= 0.5001 * x_scales[:, None]
    assert halves.all()
    exact = x_codes.double() @ codes.double().T * x_scales[:, None] * scales
    close(run(x), exact.numpy())
    same_alone(run, x, (0, 1), (3, 4), (16, 17), (3, 9))


def test_rows_of_a_matrix() -> None:
    w, full = made("q4", 75, 160)
    ids = torch.tensor([~1, 74, 75, 1 << 30], dtype=torch.int32)
    gather.arrive(ids, torch.tensor([9, 3], dtype=torch.int32))
    assert ids.tolist() == [3, 74, 75, 1 << 30]
    y = gather.embed(ids, w, 2.0)
    np.testing.assert_allclose(y.numpy(), 2 * full[[3, 74, 0, 0]], rtol=1e-6, atol=1e-7)


def test_few_rows_may_have_lower_tiles() -> None:
    config = replace(SMALL, block_m=64, few=16)
    assert [linear.row_tile(config, rows) for rows in (1, 16, 17, 900)] == [16, 16, 64, 64]
    assert linear.row_tile(SMALL, 1) == linear.row_tile(SMALL, 900) == 16


def test_a_table_comes_back_and_fits(tmp_path: Path) -> None:
    w, _ = made("q4", 75, 160)
    stacked = matrices.stack([w, w])
    config = replace(SMALL, few=16)
    table = tuned.Table("A", "3.6.0", {"q4/75x160": SMALL, "experts/2/q4/75x160": config})
    table.write(tmp_path / "a.json")
    back = tuned.read(tmp_path / "a.json")
    assert back == table
    assert back.fit(w).config == SMALL and back.fit(stacked).config == config
    assert back.fit(made("q8", 75, 160)[0]).config == made("q8", 75, 160)[0].config


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "no table"),
        ("[]", "no table"),
        ('{"device": "A", "triton": "3", "configs": {"q4/1x2": {"block_m": 16}}}', "block_n"),
        (
            '{"device": "A", "triton": "3", "configs": {"q4/1x2": {"block_m": 16, "block_n": 64, '
            '"block_k": true, "num_warps": 4, "num_stages": 2}}}',
            "block_k of q4/1x2 is True",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ElinvarError, match=said):
        tuned.read(tmp_path / "a.json")
