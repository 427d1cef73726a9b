"""Experts on GPUs, under Triton's interpreter: routes as `ref` has them, products close to f64, and a
token has its bits beside any others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from elinvar.base.config import Scoring
from elinvar.ops.arguments import Experts
from elinvar.ops.layout import WeightKind, unpack
from elinvar.ops.ref_moe import MoeRef
from elinvar.ops.ref_rows import gated_product
from elinvar.ops.triton import linear, moe
from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.matrices import stack
from elinvar.ops.triton.moe import DeviceExperts
from elinvar.ops.triton.route import route
from elinvar.ops.triton.samples import random_matrix
from elinvar.ops.triton.weights import Matrices
from triton_matrices import packed

SMALL = Config(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=2)
NUM, D, N, TOP = 5, 96, 64, 3


@pytest.mark.parametrize(
    "e, k, scoring, bias, groups, top",
    [
        (5, 2, "softmax", False, 1, 1),
        (5, 5, "sigmoid", False, 1, 1),
        (7, 3, "sigmoid", True, 1, 1),
        (20, 4, "softmax", False, 4, 2),
        (18, 4, "sigmoid", True, 3, 2),
        (12, 2, "sigmoid", False, 4, 1),
    ],
)
def test_routes(e: int, k: int, scoring: Scoring, bias: bool, groups: int, top: int) -> None:
    rng = np.random.default_rng(e)
    # Halves: many are equal, and go to the lower id.
    logits = (rng.integers(-6, 7, (17, e)) / 2).astype(np.float32)
    biases = (rng.integers(-4, 5, e) / 8).astype(np.float32) if bias else None
    for renormalise in (False, True):
        rest = (k, scoring, renormalise, 2.5)
        expected, scores = MoeRef().route(logits, *rest, biases, groups, top)
        device_bias = None if biases is None else torch.from_numpy(biases)
        ids, weights = route(torch.from_numpy(logits), *rest, device_bias, groups, top)
        np.testing.assert_array_equal(ids.numpy(), expected)
        np.testing.assert_allclose(weights.numpy(), scores, rtol=1e-5)
        for i in (0, 16):
            alone = route(torch.from_numpy(logits[i : i + 1]), *rest, device_bias, groups, top)
            assert torch.equal(alone[0], ids[i : i + 1])
            assert torch.equal(alone[1], weights[i : i + 1])


def test_routes_of_what_is_no_number_are_experts() -> None:
    logits = torch.tensor([[float("nan"), 1, float("inf"), float("-inf"), float("nan")]])
    ids, _ = route(logits, 3, "softmax", True, 1.0)
    assert ids.tolist() == [[0, 1, 2]]


def experts(kinds: tuple[str, str, str], biased: bool = False) -> tuple[DeviceExperts, Experts]:
    rng = np.random.default_rng(3)
    shapes = ((N, D), (N, D), (D, N))
    gates, ups, downs = (
        [packed(kind, *shape, rng) for _ in range(NUM)]
        for kind, shape in zip(kinds, shapes, strict=True)
    )
    biases = [rng.normal(0, 0.1, (NUM, n)).astype(np.float32) for n in (N, N, D)]
    host = Experts(gates, ups, downs, *(biases if biased else ()))
    device = Matrices(torch.device("cpu"), torch.bfloat16).experts(host)
    both, downs_on = (replace(m, tuned=SMALL) for m in (device.both, device.downs))
    return replace(device, both=both, downs=downs_on), host


def routed(rows: int, top: int = TOP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(rows)
    x = torch.from_numpy(rng.normal(0, 1, (rows, D)).astype(np.float32)).bfloat16()
    # Not the last expert: one without tokens.
    ids = np.sort([rng.permutation(NUM - 1)[:top] for _ in range(rows)], axis=1)
    weights = rng.uniform(0.1, 1, (rows, top)).astype(np.float32)
    return x, torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(weights)


def expected(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, host: Experts, scale_inputs: bool
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    y = np.zeros((len(x), D))
    bias = [np.zeros((NUM, n)) for n in (N, N, D)]
    if host.gate_bias is not None:
        bias = [b for b in (host.gate_bias, host.up_bias, host.down_bias) if b is not None]
    for t, row in enumerate(x.double().numpy()):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            before, after = (weight, 1.0) if scale_inputs else (1.0, weight)
            gate, up = (
                (row @ unpack(m[e]).T.astype(np.float64) * before + b[e]).astype(np.float32)
                for m, b in ((host.gates, bias[0]), (host.ups, bias[1]))
            )
            inner = gated_product(gate[None], up[None], "silu")[0].astype(np.float64)
            y[t] += after * (inner @ unpack(host.downs[e]).T + bias[2][e])
    return y


@pytest.mark.parametrize(
    "kinds, biased, scale_inputs",
    [
        (("bf16", "bf16", "bf16"), False, False),
        (("q4", "q4", "q8"), True, False),
        (("q8", "q5", "q5"), True, True),
    ],
)
def test_experts(kinds: tuple[str, str, str], biased: bool, scale_inputs: bool) -> None:
    """Of one kind each, or of several; a token alone has the bits that it has among 33."""
    device, host = experts(kinds, biased)
    x, ids, weights = routed(33)
    y = moe.moe(x, ids, weights, device, "silu", scale_inputs)
    assert y.dtype == torch.float32
    exact = expected(x, ids, weights, host, scale_inputs)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(y.double().numpy() / scale, exact / scale, rtol=0, atol=0.015)
    for first, last in ((0, 1), (31, 33), (5, 12), (7, 24)):
        part = slice(first, last)
        alone = moe.moe(x[part], ids[part], weights[part], device, "silu", scale_inputs)
        assert torch.equal(alone, y[part]), (first, last)


@pytest.mark.parametrize("kind", ["bf16", "q4", "fp8", "fp8-blocks", "int8", "mxfp4", "nvfp4"])
def test_a_mixture_of_one_is_a_dense_layer(kind: WeightKind) -> None:
    both, downs = (
        [replace(random_matrix(kind, n, k, "cpu", seed), tuned=SMALL) for seed in range(3)]
        for n, k in ((2 * N, D), (D, N))
    )
    x = routed(7)[0]
    ids, ones = torch.full((7, 1), 2, dtype=torch.int32), torch.ones(7, 1)
    y = linear.linear(linear.gated_linear(x, both[2], "silu"), [downs[2]])
    stacked = DeviceExperts(stack(both), stack(downs))
    assert torch.equal(moe.moe(x, ids, ones, stacked, "silu"), y.float())


def test_no_tokens() -> None:
    device, _ = experts(("bf16", "bf16", "bf16"))
    x, ids, weights = routed(1)
    assert moe.moe(x[:0], ids[:0], weights[:0], device, "silu").shape == (0, D)
    assert route(torch.zeros(0, NUM), 2, "softmax", True, 1.0)[0].shape == (0, 2)


def test_tiles_of_experts_with_few_pairs_may_be_lower() -> None:
    device, _ = experts(("bf16", "bf16", "bf16"))
    both = replace(device.both, tuned=replace(SMALL, block_m=64, few=16))
    assert [moe.tile_height(both, pairs) for pairs in (1, 80, 81)] == [16, 16, 64]
