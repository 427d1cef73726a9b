"""Sampling, swept as sweeps.py says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elinvar.ops import Biases, Penalties, SampleArgs
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


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sample_without_logprobs(temperature: float) -> None:
    """The same tokens, and nothing is told of them."""
    logits = normal(np.random.default_rng(2), 9, 3000) * 3
    args = sample_args(9, temperature=temperature)
    for ops in (REF, *CPUS.values()):
        expected = ops.sample(logits, args).ids
        result = ops.sample(logits, replace(args, num_logprobs=None))
        assert (result.ids == expected).all()
        assert result.logprobs.shape == (0,)
        assert result.top_ids.shape == result.top_logprobs.shape == (9, 0)


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


@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_tokens_are_passed_over_only_where_their_noise_cannot_win(
    temperature: float, spread: float
) -> None:
    """Unfiltered rows skip what is too far behind; those of a top_k of all but a token that cannot win
    look at each."""
    rows, vocab = 300, 1100
    logits = normal(np.random.default_rng(7), rows, vocab) * spread
    logits[:, 500] = -1e4
    few = sample_args(rows, temperature=temperature)
    each = replace(few, top_k=np.full(rows, vocab - 1, np.int32))
    for ops in CPUS.values():
        assert (ops.sample(logits, few).ids == ops.sample(logits, each).ids).all()


def test_sampling_follows_the_distribution() -> None:
    """20,000 draws of one distribution: counts within five standard deviations."""
    p = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    n = 20_000
    logits = np.tile(np.log(p).astype(np.float32), (n, 1))
    args = sample_args(n)
    counts = np.bincount(BASE.sample(logits, args).ids, minlength=5)
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


# ---- edited logits ------------------------------------------------------------------------------


def random_edits(rng: np.random.Generator, rows: int, vocab: int, parts: str) -> dict[str, object]:
    """For some rows each; every part with those who have none of it."""
    edits: dict[str, object] = {}
    if "t" in parts:
        edits["typical_p"] = np.where(rng.random(rows) < 0.6, rng.random(rows), 1).astype(
            np.float32
        )
    if "p" in parts:
        lens = rng.integers(0, 60, rows)
        edits["penalties"] = Penalties(
            starts=np.cumsum([0, *lens]).astype(np.int32),
            token_ids=rng.integers(0, min(vocab, 90), lens.sum()).astype(np.int32),
            prompt_lens=(lens * rng.random(rows)).astype(np.int32),
            repetition=rng.uniform(0.5, 2, rows).astype(np.float32),
            presence=rng.uniform(-2, 2, rows).astype(np.float32),
            frequency=rng.uniform(-2, 2, rows).astype(np.float32),
        )
    if "b" in parts:
        counts = rng.integers(0, 9, rows)
        values = rng.uniform(-20, 20, counts.sum()).astype(np.float32)
        values[rng.random(len(values)) < 0.3] = -np.inf
        edits["biases"] = Biases(
            starts=np.cumsum([0, *counts]).astype(np.int32),
            ids=rng.integers(0, vocab + 3, len(values)).astype(np.int32),
            values=values,
        )
    if "m" in parts:
        mask_rows = rng.integers(0, rows, rows).astype(np.int32)
        masks = rng.integers(0, 2**32, (rows, -(-vocab // 32)), np.uint32)
        masks[::3] |= rng.integers(0, 2, masks[::3].shape, np.uint32) * np.uint32(0xFFFFFFFF)
        edits |= {"masks": masks, "mask_rows": mask_rows}
    return edits


def allows(args: SampleArgs, row: int, token: int) -> bool:
    assert args.masks is not None and args.mask_rows is not None
    words = args.masks[args.mask_rows == row, token // 32]
    return bool((words >> np.uint32(token % 32) & 1).all())


@pytest.mark.parametrize("vocab", [17, 1000, 49152])
@pytest.mark.parametrize("parts", ["t", "p", "b", "m", "tpbm"])
@pytest.mark.parametrize(
    "over",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 0.7, "top_p": 0.9},
    ],
)
def test_edits(vocab: int, parts: str, over: dict[str, float]) -> None:
    rng = np.random.default_rng(vocab)
    rows = 11 if vocab > 2000 else 40
    logits = normal(rng, rows, vocab) * 3
    plain = sample_args(rows, **over)
    args = replace(plain, **random_edits(rng, rows, vocab, parts))
    expected, results = REF.sample(logits, args), [o.sample(logits, args) for o in CPUS.values()]
    for field in ("ids", "logprobs", "top_ids", "top_logprobs"):
        same([getattr(r, field) for r in results])
    assert (results[0].ids == expected.ids).all()
    assert np.abs(results[0].logprobs - expected.logprobs).max() < 2e-5
    # What is told of the distribution is told of the model's own.
    untouched = BASE.sample(logits, plain)
    assert (results[0].top_ids == untouched.top_ids).all()
    assert (results[0].top_logprobs == untouched.top_logprobs).all()


def test_a_row_has_its_edits_alone() -> None:
    rng = np.random.default_rng(3)
    logits = normal(rng, 12, 500) * 3
    args = replace(sample_args(12, temperature=0.9), **random_edits(rng, 12, 500, "tpbm"))
    together = BASE.sample(logits, args)
    for i in range(12):
        one = slice(i, i + 1)
        assert args.penalties and args.biases and args.typical_p is not None
        assert args.masks is not None and args.mask_rows is not None
        p, b, mine = args.penalties, args.biases, args.mask_rows == i
        tokens, biased = (slice(*x.starts[i : i + 2].tolist()) for x in (p, b))
        alone = SampleArgs(
            *(x[one] for x in (args.seeds, args.positions, args.temperature, args.top_k)),
            *(args.top_p[one], args.min_p[one], 5, args.typical_p[one]),
            Penalties(
                p.starts[i : i + 2] - p.starts[i],
                p.token_ids[tokens],
                *(x[one] for x in (p.prompt_lens, p.repetition, p.presence, p.frequency)),
            ),
            Biases(b.starts[i : i + 2] - b.starts[i], b.ids[biased], b.values[biased]),
            args.masks[mine],
            np.zeros(mine.sum(), np.int32),
        )
        assert BASE.sample(logits[one], alone).ids[0] == together.ids[i]


@pytest.mark.parametrize("fill", [None, np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("vocab", [1, 17, 300, 5000])
def test_what_a_mask_forbids_is_never_sampled(vocab: int, fill: float | None) -> None:
    rng = np.random.default_rng(vocab)
    rows = 64
    logits = normal(rng, rows, vocab) * 5
    if fill is not None:
        logits[rng.random(logits.shape) < 0.8] = fill
    masks = np.zeros((rows, -(-vocab // 32)), np.uint32)
    few = rng.integers(0, vocab, (rows, 3))
    for i, tokens in enumerate(few):
        for token in tokens:
            masks[i, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    edits = {"masks": masks, "mask_rows": np.arange(rows, dtype=np.int32)}
    for over in (
        *({"temperature": t} for t in (0.0, 1e-40, 1.0, 100.0)),
        {"top_p": 0.9999999},
        {"top_k": 20, "temperature": 100.0},
        {"top_k": 299, "top_p": 0.5},
        {"min_p": 1.0},
    ):
        for typical_p in (None, np.full(rows, 0.5, np.float32)):
            args = replace(sample_args(rows, **over), **edits, typical_p=typical_p)
            results = [ops.sample(logits, args) for ops in CPUS.values()]
            same([r.ids for r in results])
            assert all(allows(args, i, int(t)) for i, t in enumerate(results[0].ids))


def test_where_little_or_nothing_is_left() -> None:
    """The mask has the last word against biases; one that allows nothing is answered by token 0."""
    vocab = 70
    logits = np.tile(np.arange(vocab, dtype=np.float32), (3, 1))
    masks = np.zeros((3, 3), np.uint32)
    masks[0, 1], masks[1, 1] = 0b11, 0b11
    ids = np.array([33, 32, 33], np.int32)
    values = np.full(3, -np.inf, np.float32)
    for temperature in (0.0, 1.0):
        args = replace(
            sample_args(3, temperature=temperature),
            masks=masks,
            mask_rows=np.arange(3, dtype=np.int32),
            biases=Biases(np.array([0, 1, 3, 3], np.int32), ids, values),
        )
        for ops in (REF, *CPUS.values()):
            found = ops.sample(logits, args).ids.tolist()
            assert found[0] == 32 and found[1] in (32, 33) and found[2] == 0


def test_masks_of_another_size_are_refused() -> None:
    args = sample_args(1)
    for masks in (np.zeros((1, 3), np.uint32), np.zeros((2, 4), np.uint32)):
        with pytest.raises(ValueError, match="masks must be"):
            BASE.sample(
                np.zeros((1, 100), np.float32),
                replace(args, masks=masks, mask_rows=np.zeros(1, np.int32)),
            )
