"""Sampling of the provider `triton` under Triton's interpreter, against the oracle."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made, at their import

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from elinvar.ops import SampleArgs, ref_sample  # noqa: E402
from elinvar.ops.triton import noise, sampling  # noqa: E402
from gpu_caches import torched  # noqa: E402
from sweeps import REF, normal  # noqa: E402
from test_ops_sample import allows, random_edits, sample_args  # noqa: E402


def run(logits: np.ndarray, args: SampleArgs) -> list[np.ndarray]:
    return [x.numpy() for x in sampling.sample(torched(logits)[0], args)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several a row."""
    monkeypatch.setattr(sampling, "_BLOCK", 256)


FILTERS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 5.0},
    "top-k": {"top_k": 7},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "flat top-p": {"temperature": 100.0, "top_p": 0.99},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
}


@pytest.mark.parametrize("over", FILTERS.values(), ids=FILTERS)
def test_sample(over: dict[str, float]) -> None:
    logits = normal(np.random.default_rng(6), 4, 700) * 3  # the last block is not full
    args = replace(sample_args(4, **over), num_logprobs=3)
    expected = REF.sample(logits, args)
    ids, logprobs, top_ids, top_logprobs = run(logits, args)
    assert (ids == expected.ids).all() and (top_ids == expected.top_ids).all()
    assert np.abs(logprobs - expected.logprobs).max() < 1e-5
    assert np.abs(top_logprobs - expected.top_logprobs).max() < 1e-5
    ids, *told = run(logits, replace(args, num_logprobs=None))
    assert (ids == expected.ids).all() and not any(part.size for part in told)


@pytest.mark.parametrize("over", [{"top_k": 5}, {"top_p": 0.4}, {"temperature": 0.0}])
def test_equal_logits_are_kept_by_id(over: dict[str, float]) -> None:
    """Few values, so that cuts lie among equal ones."""
    rng = np.random.default_rng(4)
    logits = rng.integers(0, 3, (6, 64)).astype(np.float32)
    logits[:, ::5] *= -1  # 0 and -0
    args = replace(sample_args(6, **over), num_logprobs=9)
    expected = REF.sample(logits, args)
    ids, _, top_ids, _ = run(logits, args)
    assert (ids == expected.ids).all() and (top_ids == expected.top_ids).all()


@pytest.mark.parametrize("parts", ["t", "p", "b", "m", "tpbm"])
@pytest.mark.parametrize("over", [FILTERS["greedy"], FILTERS["all"]], ids=["greedy", "all"])
def test_edits(parts: str, over: dict[str, float]) -> None:
    rng = np.random.default_rng(8)
    logits = normal(rng, 6, 300) * 3
    args = replace(sample_args(6, **over), **random_edits(rng, 6, 300, parts))
    expected = REF.sample(logits, args)
    ids, logprobs, *_ = run(logits, args)
    assert (ids == expected.ids).all()
    assert np.abs(logprobs - expected.logprobs).max() < 1e-5


@pytest.mark.parametrize("fill", [np.nan, -np.inf, np.inf])
def test_what_a_mask_forbids_is_never_sampled(fill: float) -> None:
    rng = np.random.default_rng(5)
    logits = normal(rng, 3, 70) * 5
    logits[rng.random(logits.shape) < 0.8] = fill
    masks = np.zeros((3, 3), np.uint32)
    for i, token in enumerate(rng.integers(0, 70, 3)):
        masks[i, token // 32] |= np.uint32(1) << np.uint32(token % 32)
        masks[i, 0] |= np.uint32(1)
    edits = {"masks": masks, "mask_rows": np.arange(3, dtype=np.int32)}
    half = np.full(3, 0.5, np.float32)
    for over, typical_p in (
        ({}, half),
        ({"temperature": 1e-40, "top_p": 0.9999999}, None),
        ({"top_k": 20, "min_p": 1.0}, half),
    ):
        args = replace(sample_args(3, **over), **edits, typical_p=typical_p)
        ids = run(logits, args)[0]
        assert all(allows(args, i, int(token)) for i, token in enumerate(ids))


def test_a_mask_that_allows_nothing_is_answered_by_token_0() -> None:
    logits = np.tile(np.arange(40, dtype=np.float32), (2, 1))
    edits = {"masks": np.zeros((2, 2), np.uint32), "mask_rows": np.arange(2, dtype=np.int32)}
    for temperature in (0.0, 1.0):
        args = replace(sample_args(2, temperature=temperature), **edits)
        assert not run(logits, args)[0].any()


def test_a_row_has_its_own_bits() -> None:
    logits = normal(np.random.default_rng(3), 3, 300) * 3
    args = replace(sample_args(3, **FILTERS["all"]), num_logprobs=3)
    together = run(logits, args)
    for i in range(3):
        one = slice(i, i + 1)
        names = "seeds", "positions", "temperature", "top_k", "top_p", "min_p"
        alone = replace(args, **{name: getattr(args, name)[one] for name in names})
        for a, b in zip(run(logits[one], alone), together, strict=True):
            assert a[0].tobytes() == b[i].tobytes()


def test_noise_is_that_of_the_cpu() -> None:
    """Words to the bit, and noise as near as f32 is to f64."""

    @triton.jit
    def both(words, out, start, position, low, high, N: tl.constexpr):
        i = tl.arange(0, N // 4)
        parts = noise.philox((start // 4 + i).to(tl.uint32), position, low, high)
        for j in tl.static_range(4):
            tl.store(words + j * (N // 4) + i, parts[j])
        tl.store(out + tl.arange(0, N), noise.gumbel(start, position, low, high, N))

    for seed in (0, 2**64 - 1, 0x9E3779B97F4A7C15):
        words, out = torch.empty(256, dtype=torch.uint32), torch.empty(256)
        low, high = np.array([seed], np.uint64).view(np.int32).tolist()
        both[(1,)](words, out, 2048, 77, low, high, 256)
        expected = ref_sample.philox(np.arange(512, 576, dtype=np.uint64), 77, seed)
        assert (words.numpy().reshape(4, 64) == expected).all()
        exact = ref_sample.gumbel(seed, 77, np.arange(2048, 2304))
        assert np.abs(out.numpy() - exact).max() < 2e-6
