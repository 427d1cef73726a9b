"""Self-speculation: first layers draft over the target's own cache, and leave no trace in it."""

from __future__ import annotations

import numpy as np
import pytest

from drill import Drill
from elinvar.base.sampling import SamplingParams
from elinvar.nn.decoder import Decoder
from elinvar.run.drafters.early_exit import EarlyExitDrafter, can_exit
from engines import provider, tiny_model
from families import ENGINES
from helpers import Span, make_batch, make_cache

PARAMS = (
    SamplingParams(temperature=0, seed=1),
    SamplingParams(temperature=1.1, top_p=0.9, seed=2),
    SamplingParams(temperature=0.7, presence_penalty=0.5, logit_bias={3: 2.0}, seed=3),
)


def drill(num_layers: int | None, family: str = "llama") -> Drill:
    ops = provider()
    model = tiny_model(ops, family)
    assert isinstance(model, Decoder) and can_exit(model)
    target = model
    if num_layers is None:
        return Drill(target, ops)
    return Drill(target, ops, lambda rows, kv: EarlyExitDrafter(target, num_layers, ops, kv, rows))


def prompt(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, 20 + 7 * seed).tolist()


def run(one: Drill, most: int, num_steps: int, num_tokens: int) -> list[list[int]]:
    for row, params in enumerate(PARAMS):
        one.start(row, prompt(row), params)
    for _ in range(num_steps):
        one.step(most)
    return [
        one.rows.token_ids[row, : len(prompt(row)) + num_tokens].tolist()
        for row in range(len(PARAMS))
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_all_layers_are_always_right(family: str) -> None:
    """They are the target: with its noise and its edits they draw what it draws."""
    one = drill(ENGINES[family].num_layers, family)
    plain = run(drill(None, family), 0, 16, 16)
    assert run(one, 3, 5, 16) == plain
    assert all(p.num_accepted == p.num_proposed == 12 for p in one.live.values())


def test_wrong_drafts_leave_no_trace() -> None:
    one, plain = drill(1), drill(None)
    assert run(one, 4, 16, 16) == run(plain, 0, 16, 16)
    assert sum(p.num_proposed for p in one.live.values()) > 0
    for row, progress in one.live.items():
        ids = one.rows.token_ids[row, : progress.num_computed].tolist()
        fresh = drill(None)
        fresh.start(0, ids, SamplingParams(seed=0))
        fresh.step()
        for ours, theirs in zip(one.kv, fresh.kv, strict=True):
            for at in range(len(ids)):
                (b, c), slot = (one.blocks[row][at // 32], fresh.blocks[0][at // 32]), at % 32
                assert np.array_equal(ours.k[b][..., slot], theirs.k[c][..., slot])
                assert np.array_equal(ours.v[b][:, slot], theirs.v[c][:, slot])


def test_a_model_that_ends_early() -> None:
    """Of its taps the last norm makes what `hidden_early` returns, and taps change nothing else."""
    ops = provider()
    model = tiny_model(ops)
    assert isinstance(model, Decoder)
    dim, batch = model.config.dim, make_batch([Span(prompt(1), 0, 27, [1])], 1)
    plain = model.hidden(batch, make_cache(model, ops, 2, "f32"), all_tokens=True)
    early = model.hidden_early(batch, make_cache(model, ops, 2, "f32"), 1)
    model.taps = (0, 1)
    tapped = model.hidden(batch, make_cache(model, ops, 2, "f32"), all_tokens=True)
    first = np.ascontiguousarray(tapped[:, dim : 2 * dim])
    assert tapped.shape == (27, 3 * dim)
    assert np.array_equal(tapped[:, :dim], plain)
    assert np.array_equal(model.next_norms[-1](first), early)
    assert np.array_equal(model.logits(tapped), model.logits(plain))
    assert model.hidden(batch, make_cache(model, ops, 2, "f32")).shape == (27, dim)


def test_which_models_can_exit() -> None:
    ops = provider()
    assert not can_exit(tiny_model(ops, "gemma3n"))
    assert not can_exit(tiny_model(ops, "qwen3_next"))
