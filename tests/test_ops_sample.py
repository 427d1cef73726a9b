"""Sampling, swept as sweeps.py says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elinvar.ops import SampleArgs
from sweeps import BASE, CPUS, REF, normal, same


def sample_args(rows: int, **over: object) -> SampleArgs:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | over
    return SampleArgs(
        seeds=np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        positions=np.arange(5, rows + 5, dtype=np.int32),
        temperature=np.full(rows, values["temperature"], np.float32),
        top_k=np.full(rows, values["top_k"], np.int32),
        top_p=np.full(rows, values["top_p"], np.float32),
        min_p=np.full(rows, values["min_p"], np.float32),
        num_logprobs=5,
    )


@pytest.mark.parametrize("vocab", [17, 1000, 49152])
@pytest.mark.parametrize(
    "over",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 3.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 4},
        {"top_k": 40, "top_p": 0.5},
        {"min_p": 0.1},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_sample(vocab: int, over: dict[str, float]) -> None:
    rows = 17 if vocab > 2000 else 97
    logits = normal(np.random.default_rng(vocab), rows, vocab) * 3
    args = sample_args(rows, **over)
    expected, results = REF.sample(logits, args), [o.sample(logits, args) for o in CPUS.values()]
    for field in ("ids", "logprobs", "top_ids", "top_logprobs"):
        same([getattr(r, field) for r in results])
    assert (results[0].ids == expected.ids).all()
    assert (results[0].top_ids == expected.top_ids).all()
    assert np.abs(results[0].logprobs - expected.logprobs).max() < 2e-5
    assert np.abs(results[0].top_logprobs - expected.top_logprobs).max() < 2e-5


def test_sample_ties_go_to_the_lower_id() -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[1, [40, 7]] = 5
    args = sample_args(2, temperature=0.0)
    for ops in (REF, *CPUS.values()):
        result = ops.sample(logits, args)
        assert result.ids.tolist() == [0, 7]
        assert result.top_ids.tolist() == [[0, 1, 2, 3, 4], [7, 40, 0, 1, 2]]


@pytest.mark.parametrize("vocab", [1, 17, 300, 5000])
@pytest.mark.parametrize("fill", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("every", [1, 3])
def test_sample_of_what_is_not_finite(vocab: int, fill: float, every: int) -> None:
    """Some token comes out, the same everywhere, and a number goes before what is none."""
    logits = normal(np.random.default_rng(vocab), 6, vocab) * 5
    logits[:, ::every] = fill
    for over in (
        *({"temperature": t, "top_p": p} for t in (0.0, 1e-40, 1e-6, 1.0, 100.0) for p in (0.9, 1)),
        {"top_p": 1e-9},
        {"top_p": 0.9999999},
        {"top_k": 299, "temperature": 100.0, "min_p": 1e-40},
        {"top_k": 2**31 - 1, "top_p": 0.5},
        {"min_p": 1.0},
    ):
        args = replace(sample_args(6, **over), num_logprobs=20)
        results = [ops.sample(logits, args) for ops in CPUS.values()]
        ids = results[0].ids
        same([r.ids for r in results])
        same([r.top_ids for r in results])
        assert results[0].top_ids.shape == (6, min(20, vocab))
        assert (ids >= 0).all() and (ids < vocab).all()
        if vocab > 1 and every == 3 and not fill > 0:
            assert (ids % 3 != 0).all()


def test_sampling_follows_the_distribution() -> None:
    """20,000 draws of one distribution: counts within five standard deviations."""
    p = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    n = 20_000
    logits = np.tile(np.log(p).astype(np.float32), (n, 1))
    args = sample_args(n)
    counts = np.bincount(BASE.sample(logits, args).ids, minlength=5)
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()
