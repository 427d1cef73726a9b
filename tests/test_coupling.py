"""Shared noise: how often two distributions then choose the same token (benchmarks/coupling.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines import provider

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import coupling

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    count = draw(st.integers(2, 12))
    weights = st.lists(st.floats(1e-3, 1), min_size=count, max_size=count).map(np.array)
    p, q = draw(weights), draw(weights)
    return p / p.sum(), q / q.sum()


def distance(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float(np.abs(p - q).sum() / 2)


@given(pairs())
def test_the_sum_over_all_pairs(pair: Pair) -> None:
    p, q = pair
    slow = sum(1 / np.maximum(p / p[x], q / q[x]).sum() for x in range(len(p)))
    found, tv = coupling.coupling(p, q), distance(p, q)
    assert abs(found - slow) < 1e-9
    assert (1 - tv) / (1 + tv) - 1e-9 <= found <= 1 - tv + 1e-9


def test_the_sampler_shares_noise_so() -> None:
    """Counted over seeds, within five standard errors of what the distributions say."""
    rng = np.random.default_rng(3)
    draws = 4096
    for spread in (0.2, 1.0, 3.0):
        target = rng.normal(size=64).astype(np.float32) * 2
        draft = target + rng.normal(size=64).astype(np.float32) * np.float32(spread)
        p, q = coupling.softmax(target), coupling.softmax(draft)
        found = coupling.coupling(p, q)
        ids = [
            # Positions differ, so one seed is as good as many.
            coupling.sampled(provider(), np.repeat(logits[None], draws, 0), 11)
            for logits in (target, draft)
        ]
        error = np.sqrt(found * (1 - found) / draws)
        assert abs((ids[0] == ids[1]).mean() - found) < 5 * error
