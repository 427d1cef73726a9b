"""Heads as drafters: what they keep is what a fresh computation writes, and a head that is right is
always believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drill import Drill
from elinvar.base.sampling import SamplingParams
from elinvar.models import llama
from elinvar.models.mtp import NEXTN, mtp_rules
from elinvar.nn.mtp import MTPDecoder
from elinvar.ops import Ops
from elinvar.ops.layout import pack_float
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.weights.rules import bind
from engines import provider, random_weight
from families.base import LLAMA, VOCAB


@cache
def model(num_heads: int, is_right: bool = False, ops: Ops | None = None) -> MTPDecoder:
    """Random weights, for `ops`. is_right: what follows a token depends on that token alone, and the heads say
    the same as the model."""
    config = replace(LLAMA, mtp_layers=num_heads)
    rng = np.random.default_rng(11)
    weights: dict[str, Any] = {}
    rules = [*llama.rules(config), *mtp_rules(config, llama.rules, NEXTN)]
    for binding in bind(rules, "safetensors", config.num_layers):
        shape = binding.shape
        assert shape is not None
        if len(shape) == 1:
            weights[binding.name] = np.ones(shape, np.float32)
        elif is_right and binding.name.endswith((".o", ".down")):
            weights[binding.name] = pack_float("f32", np.zeros(shape, np.float32))
        elif is_right and binding.name.endswith("join"):
            both = np.hstack([np.eye(config.dim), np.zeros((config.dim, config.dim))])
            weights[binding.name] = pack_float("f32", both.astype(np.float32))
        else:
            weights[binding.name] = random_weight(rng, "f32", *shape)
    ops = ops or provider()
    ops.prepare(weights)
    built = llama.build(config, weights, ops)
    assert isinstance(built, MTPDecoder)
    return built


def drill(num_heads: int, is_right: bool = False, **options: Any) -> Drill:
    target = model(num_heads, is_right)
    return Drill(
        target,
        provider(),
        lambda rows, kv: HeadsDrafter("mtp", target, provider(), kv, rows),
        **options,
    )


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def head_slots(one: Drill, row: int, head: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [stop, ...] that a head has of a row's tokens."""
    layer, blocks = one.kv[one.model.config.num_layers + head], one.blocks[row]
    keys = np.concatenate([layer.k[b].transpose(2, 0, 1) for b in blocks])
    values = np.concatenate([layer.v[b].transpose(1, 0, 2) for b in blocks])
    return keys[:stop], values[:stop]


def assert_slots(one: Drill, num_heads: int, but: Sequence[int] = ()) -> None:
    """Of every row they are those of its tokens computed at once, but for those at some positions."""
    one.drafter.catch_up()  # type: ignore[union-attr]
    for row, progress in one.live.items():
        fresh = drill(num_heads)
        stop = progress.num_computed
        fresh.start(0, one.rows.token_ids[row, :stop].tolist(), SamplingParams(seed=0))
        fresh.step()
        fresh.drafter.catch_up()  # type: ignore[union-attr]
        for head in range(num_heads):
            wanted = [p for p in range(head + 1, stop) if p not in but]
            pairs = zip(
                head_slots(one, row, head, stop), head_slots(fresh, 0, head, stop), strict=True
            )
            for kept, computed in pairs:
                assert np.array_equal(kept[wanted], computed[wanted])


@given(
    num_heads=st.sampled_from([1, 1, 2, 3]),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20)), min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=25)
def test_slots_are_those_of_a_fresh_computation(
    num_heads: int, lengths: list[int], steps: list[tuple[int, int]], temperature: float
) -> None:
    """Whatever was drafted, accepted and rejected, in chunks of any sizes, beside others."""
    one = drill(num_heads)
    for row, length in enumerate(lengths):
        params = SamplingParams(temperature=temperature, seed=row)
        one.start(row, prompt(row, length), params)
    for most, chunk in steps:
        one.step(most, dict.fromkeys(one.live, chunk))
    assert_slots(one, num_heads)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_head_that_is_right_is_always_believed(num_heads: int, temperature: float) -> None:
    one = drill(num_heads, is_right=True)
    for row in range(3):
        one.start(row, prompt(row, 9 + row), SamplingParams(temperature=temperature, seed=row))
    for _ in range(12):
        one.step(3)
    for progress in one.live.values():
        assert progress.num_proposed == 11 * 3
        assert progress.num_accepted == progress.num_proposed


def test_accepted_drafts_are_seen_by_the_heads() -> None:
    one = drill(2)
    one.start(0, prompt(0, 40), SamplingParams(temperature=0, seed=0))
    one.step()
    heads = one.drafter
    assert heads is not None
    answer = drill(2)
    answer.drafter = None
    answer.start(0, prompt(0, 40), SamplingParams(temperature=0, seed=0))
    for _ in range(17):
        answer.step()
    known = answer.release(0)

    class Oracle:
        """What another drafter proposed is accepted, and the heads are told of it."""

        def propose(self, asks: Any) -> Any:
            guesses = heads.propose(asks)
            for ask, guess in zip(asks, guesses, strict=True):
                guess.tokens = known[ask.num_tokens : ask.num_tokens + ask.most]
            return guesses

        def __getattr__(self, name: str) -> Any:
            return getattr(heads, name)

    one.drafter = cast("Drafter", Oracle())
    for _ in range(4):
        one.step(3)
    assert one.live[0].num_accepted == 12
    assert one.rows.token_ids[0, : one.live[0].num_tokens].tolist() == known
    assert_slots(one, 2)


def test_after_a_prefix_hit_heads_wait_for_a_state() -> None:
    one = drill(1)
    ids = prompt(0, 48)
    one.start(0, ids, SamplingParams(temperature=0, seed=0))
    one.step()
    one.drafter.catch_up()  # type: ignore[union-attr]
    before = head_slots(one, 0, 0, 48)[0][:40].copy()
    one.release(0)
    one.start(0, [*ids[:40], 7], SamplingParams(temperature=0, seed=0), found=40)
    one.step(3)
    assert one.live[0].num_proposed == 0
    one.step(3)
    assert one.live[0].num_proposed == 3
    assert np.array_equal(head_slots(one, 0, 0, 40)[0], before)
    assert_slots(one, 1, but=[40])


def test_a_row_that_is_anybody_elses_has_no_state() -> None:
    one = drill(1)
    for ids in (prompt(0, 40), prompt(1, 33)):
        one.start(0, ids, SamplingParams(temperature=0.8, seed=1))
        one.step(2)
        one.step(2)
        assert_slots(one, 1)
        one.release(0)
    one.start(0, prompt(2, 34), SamplingParams(seed=1), found=33)
    assert one.drafter is not None
    one.step(2)
    assert one.live[0].num_proposed == 0
