"""Experts on GPUs, under Triton's interpreter: routes as `ref` has them, products close to f64, and a
token has its bits beside any others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton_matrices import packed

from elinvar.base.config import Scoring
from elinvar.ops.arguments import Experts
from elinvar.ops.layout import unpack
from elinvar.ops.ref_moe import MoeRef
from elinvar.ops.ref_rows import gated_product
from elinvar.ops.triton import linear, moe
from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.moe import DeviceExperts
from elinvar.ops.triton.route import route

SMALL = Config(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=2)
NUM, D, N, TOP = 5, 96, 40, 3


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
    shapes = ((N, D), (N, D), (D, N if N % 32 == 0 else 64))
    gates, ups, downs = (
        [packed(kind, *shape, rng) for _ in range(NUM)]
        for kind, shape in zip(kinds, shapes, strict=True)
    )
    biases = [rng.normal(0, 0.1, (NUM, n)).astype(np.float32) for n in (N, N, D)]
    host = Experts(gates, ups, downs, *(biases if biased else ()))
    device = moe.on_device(host, torch.bfloat16, "cpu")
    both, downs_on = (replace(m, tuned=SMALL) for m in (device.both, device.downs))
    return replace(device, both=both, downs=downs_on), host
