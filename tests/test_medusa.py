"""Medusa heads in their published layout, and what they draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from drill import Drill
from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.models.drafts import load_heads
from elinvar.nn.decoder import Decoder
from elinvar.nn.medusa import MedusaHeads
from elinvar.run.drafters.medusa import MedusaDrafter
from elinvar.weights.checkpoint import open_checkpoint
from engines import provider, tiny_model
from families.base import LLAMA, VOCAB
from helpers import Span, make_batch

HEADS = 3


def tensors(prefix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for n in range(HEADS):
        for i in range(2):
            found[f"{prefix}{n}.{i}.linear.weight"] = rng.standard_normal((LLAMA.dim, LLAMA.dim))
            found[f"{prefix}{n}.{i}.linear.bias"] = rng.standard_normal(LLAMA.dim)
        found[f"{prefix}{n}.2.weight"] = rng.standard_normal((VOCAB, LLAMA.dim))
    return {name: (array / 8).astype(np.float32) for name, array in found.items()}


def write(folder: Path, prefix: str = "", **config: Any) -> Path:
    told = {"medusa_num_heads": HEADS, "medusa_num_layers": 2, "hidden_size": LLAMA.dim}
    (folder / "config.json").write_text(json.dumps(told | config))
    save_file(tensors(prefix), folder / "medusa_lm_head.safetensors")
    return folder


def load(folder: Path) -> MedusaHeads:
    found = load_heads(open_checkpoint(folder), target(), provider(), "f32")
    assert isinstance(found, MedusaHeads)
    return found


def target() -> Decoder:
    model = tiny_model(provider(), kind="f32")
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_the_formula(prefix: str, tmp_path: Path) -> None:
    heads, w = load(write(tmp_path, prefix)), tensors()
    h = np.random.default_rng(1).standard_normal((5, LLAMA.dim)).astype(np.float32)
    for n in range(HEADS):
        x = h.astype(np.float64)
        for i in range(2):
            y = x @ w[f"{n}.{i}.linear.weight"].T + w[f"{n}.{i}.linear.bias"]
            x = x + y / (1 + np.exp(-y))
        np.testing.assert_allclose(
            heads.logits(h, n), x @ w[f"{n}.2.weight"].T, rtol=1e-4, atol=1e-4
        )


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has hidden_size = 32, and heads for this model need 64"):
        load(write(tmp_path, hidden_size=32))


def test_it_drafts_from_the_last_state(tmp_path: Path) -> None:
    """Each draft is what its head says of the token that was computed last, whatever came before."""
    heads, model, ops = load(write(tmp_path)), target(), provider()
    one = Drill(model, ops, lambda rows, kv: MedusaDrafter(heads, LLAMA.dim, ops, rows))
    plain = Drill(model, ops)
    for row in range(3):
        ids = np.random.default_rng(row).integers(0, 256, 10 + 20 * row).tolist()
        for each in (one, plain):
            each.start(row, ids, SamplingParams(temperature=0.6 * row, seed=row))
    asked: list[tuple[int, list[int]]] = []
    propose = one.drafter.propose  # type: ignore[union-attr]

    def watched(asks: Any) -> Any:
        guesses = propose(asks)
        asked.extend(
            (ask.num_tokens, g.tokens) for ask, g in zip(asks, guesses, strict=True) if ask.row == 0
        )
        return guesses

    one.drafter.propose = watched  # type: ignore[union-attr,method-assign]
    for _ in range(20):
        one.step(5)
        plain.step()
    for row in range(3):
        known = plain.live[row].num_tokens
        assert np.array_equal(one.rows.token_ids[row, :known], plain.rows.token_ids[row, :known])
    fresh = Drill(model, ops)
    ids = one.rows.token_ids[0, : one.live[0].num_tokens].tolist()
    h = model.hidden(make_batch([Span(ids, 0, len(ids), fresh.blocks[0])], 1), fresh.kv, True)
    assert len(asked) == 19
    for num_tokens, tokens in asked:
        state = h[num_tokens - 2, None]
        assert tokens == [int(heads.logits(state, k).argmax()) for k in range(HEADS)]
