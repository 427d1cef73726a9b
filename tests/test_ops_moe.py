"""Ops of mixtures of experts, swept as sweeps.py says."""

from __future__ import annotations

import numpy as np
import pytest

from elinvar.ops import Ops
from elinvar.ops.arguments import Experts
from elinvar.ops.layout import QUANTISED, WeightKind
from sweeps import BASE, CPUS, KINDS, REF, ROWS, close, normal, same, weight


def distinct(rng: np.random.Generator, rows: int, experts: int, k: int) -> np.ndarray:
    ids = [np.sort(rng.permutation(experts)[:k]) for _ in range(rows)]
    return np.array(ids, np.int32)


def mixture(rng: np.random.Generator, kinds: list[WeightKind], f: int, d: int) -> Experts:
    """As many experts as kinds; the downs have the kinds in the other order."""
    gates, ups = ([weight(rng, kind, f, d) for kind in kinds] for _ in range(2))
    return Experts(gates, ups, [weight(rng, kind, d, f) for kind in reversed(kinds)])


ROUTES = [
    ("softmax", False, False, 1, 1),
    ("softmax", True, False, 1, 1),
    ("softmax", True, True, 1, 1),
    ("softmax", False, False, 4, 2),
    ("sigmoid", False, False, 1, 1),
    ("sigmoid", True, True, 1, 1),
    ("sigmoid", True, True, 4, 2),
    ("sigmoid", True, False, 4, 3),
]


@pytest.mark.parametrize(
    ("experts", "scoring", "renormalise", "bias", "groups", "top_groups"),
    [(n, *route) for n in (1, 7, 24, 128) for route in ROUTES if n % route[3] == 0],
)
def test_route(
    experts: int, scoring: str, renormalise: bool, bias: bool, groups: int, top_groups: int
) -> None:
    rng = np.random.default_rng(experts)
    logits, k = normal(rng, 97, experts) * 4, min(6, experts)
    bias_E = normal(rng, experts) if bias else None
    args = (k, scoring, renormalise, 2.5, bias_E, groups, top_groups)
    ids, weights = BASE.route(logits, *args)
    expected = REF.route(logits, *args)
    same([expected[0], ids])
    close(weights, expected[1])
    size = experts // groups
    assert max(len(set(row // size)) for row in ids) <= top_groups
    for rows in (1, 3, 17, 97):
        outputs = [ops.route(logits[:rows].copy(), *args) for ops in CPUS.values()]
        same([ids[:rows].copy(), *(o[0] for o in outputs)])
        same([weights[:rows].copy(), *(o[1] for o in outputs)])


def test_route_of_ties_and_of_what_is_not_finite() -> None:
    logits = np.zeros((5, 40), np.float32)
    logits[1, [30, 20, 10]] = 1
    logits[2, 3:] = -np.inf
    logits[3, ::2] = np.nan
    logits[4] = np.nan
    high = np.full((1, 40), 30, np.float32)
    high[0, [5, 9]] = 50, 40  # sigmoids of one value
    assert BASE.route(high, 2, "sigmoid", False, 1.0)[0].tolist() == [[5, 9]]
    for scoring in ("softmax", "sigmoid"):
        results = [ops.route(logits, 4, scoring, True, 1.0) for ops in CPUS.values()]
        ids = results[0][0]
        same([r[0] for r in results])
        assert ids[:3].tolist() == [[0, 1, 2, 3], [0, 10, 20, 30], [0, 1, 2, 3]]
        assert (ids[3] % 2 == 1).all()
        assert (np.diff(ids) > 0).all() and (ids >= 0).all() and (ids < 40).all()
        same([r[1][:3].copy() for r in results])
        assert np.isfinite(results[0][1][:3]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("f", "d", "k"), [(32, 32, 1), (96, 160, 3), (352, 64, 5)])
def test_moe(kind: WeightKind, f: int, d: int, k: int) -> None:
    rng = np.random.default_rng(f)
    experts = mixture(rng, [kind] * 9, f, d)
    x, ids, weights = normal(rng, 97, d), distinct(rng, 97, 9, k), normal(rng, 97, k)
    whole = BASE.moe(x, ids, weights, experts, "silu")
    close(whole, REF.moe(x, ids, weights, experts, "silu"), 1e-5)
    for rows in ROWS:
        part = [a[:rows].copy() for a in (x, ids, weights)]
        outputs = [ops.moe(*part, experts, "silu") for ops in CPUS.values()]
        same([whole[:rows].copy(), *outputs])
    for i in (0, 50, 96):
        one = slice(i, i + 1)
        same([whole[one], BASE.moe(x[one], ids[one], weights[one], experts, "silu")])


def test_moe_is_the_dense_layers_of_its_experts() -> None:
    """Matrices of all kinds side by side; one expert has no token and one has all of them."""
    rng = np.random.default_rng(3)
    experts = mixture(rng, KINDS, 64, 96)
    x, weights = normal(rng, 40, 96), normal(rng, 40, 2)
    ids = np.stack([rng.integers(0, 4, 40), np.full(40, 5)], 1).astype(np.int32)
    expected = np.zeros((40, 96), np.float32)
    for t, j in np.ndindex(ids.shape):
        e, row = ids[t, j], x[t : t + 1]
        h = BASE.gated_linear(row, experts.gates[e], experts.ups[e], "gelu_tanh")
        y = BASE.linear(h, [experts.downs[e]])[0].astype(np.float64)
        # In float64 the product is exact, and the sum is rounded twice only by rare misfortune.
        expected[t] = y * np.float64(weights[t, j]) + expected[t]
    outputs = [ops.moe(x, ids, weights, experts, "gelu_tanh") for ops in CPUS.values()]
    same([expected, *outputs])


@pytest.mark.parametrize("kind", ["q8", "f16"])
def test_moe_with_biases(kind: WeightKind) -> None:
    """As gpt-oss has them; gates and ups go beyond what they are clamped to."""
    rng = np.random.default_rng(4)
    experts = mixture(rng, [kind] * 5, 96, 64)
    experts.gate_bias, experts.up_bias = normal(rng, 5, 96) * 8, normal(rng, 5, 96) * 8
    experts.down_bias = normal(rng, 5, 64)
    x, ids, weights = normal(rng, 33, 64), distinct(rng, 33, 5, 2), normal(rng, 33, 2)
    outputs = [ops.moe(x, ids, weights, experts, "swiglu_oai") for ops in CPUS.values()]
    close(outputs[0], REF.moe(x, ids, weights, experts, "swiglu_oai"), 1e-5)
    same(outputs)
    same([outputs[0][7:8], BASE.moe(x[7:8], ids[7:8], weights[7:8], experts, "swiglu_oai")])


@pytest.mark.parametrize("kind", KINDS)
def test_moe_that_scales_inputs(kind: WeightKind) -> None:
    """Of two experts a token, with biases: these are not scaled."""
    rng = np.random.default_rng(5)
    experts = mixture(rng, [kind] * 5, 96, 64)
    experts.gate_bias, experts.up_bias = normal(rng, 5, 96), normal(rng, 5, 96)
    x, ids, weights = normal(rng, 33, 64), distinct(rng, 33, 5, 2), normal(rng, 33, 2)
    outputs = [ops.moe(x, ids, weights, experts, "silu", True) for ops in CPUS.values()]
    # What is rounded to int8 between the matrices may fall to either side of a half.
    tolerance = 2e-4 if kind in QUANTISED else 1e-5
    close(outputs[0], REF.moe(x, ids, weights, experts, "silu", True), tolerance)
    same(outputs)
    same([outputs[0][7:8], BASE.moe(x[7:8], ids[7:8], weights[7:8], experts, "silu", True)])
    if kind == "f32":  # what it means, by other ops
        one = np.ascontiguousarray(ids[:, :1])
        scaled = BASE.moe(x * weights[:, :1], one, np.ones((33, 1), np.float32), experts, "silu")
        close(BASE.moe(x, one, weights[:, :1].copy(), experts, "silu", True), scaled, 1e-5)


def test_a_recorded_mixture_routes_anew() -> None:
    """Which experts a token goes to is read when the recording runs, not when it was made."""
    rng = np.random.default_rng(9)
    experts, router = mixture(rng, ["q4"] * 12, 64, 96), weight(rng, "f32", 12, 96)
    for ops in CPUS.values():
        x = normal(rng, 5, 96)

        def step(ops: Ops = ops, x: np.ndarray = x) -> np.ndarray:
            ids, weights = ops.route(ops.linear(x, [router]), 3, "softmax", True, 1.0)
            return ops.moe(x, ids, weights, experts, "silu")

        replay = ops.record(step)
        for _ in range(3):
            x[:] = normal(rng, 5, 96)
            same([step(), replay().copy()])
