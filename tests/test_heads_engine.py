"""Drafters that look into the model, in an engine: answers are those without, to the bit, whatever is
asked for, preempted, found in the cache or moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import test_eagle
import test_medusa
from elinvar.engine.drafts import Given
from elinvar.models.drafts import load_heads
from elinvar.nn.decoder import Decoder
from elinvar.nn.medusa import MedusaHeads
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.early_exit import EarlyExitDrafter
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.run.drafters.medusa import MedusaDrafter
from elinvar.run.runner import Runner
from elinvar.weights.checkpoint import open_checkpoint
from engines import answers, provider, tiny_engine, tiny_model
from oracles import verify_all
from test_heads import model as mtp_model
from test_speculation import KINDS, preempt_amid, sixteen

Made = tuple[Decoder, Callable[[Runner], Drafter]]


def mtp(folder: Path) -> Made:
    model = mtp_model(2)
    return model, lambda r: HeadsDrafter("mtp", model, provider(), r.kv, r.rows)


def right(folder: Path) -> Made:
    model = mtp_model(1, is_right=True)
    return model, lambda r: HeadsDrafter("mtp", model, provider(), r.kv, r.rows)


def eagle(folder: Path) -> Made:
    return _eagle(folder, third=False)


def eagle3(folder: Path) -> Made:
    return _eagle(folder, third=True)


def _eagle(folder: Path, third: bool) -> Made:
    pytest.importorskip("torch")
    test_eagle.write(folder, third)
    model = test_eagle.tiny_target()
    heads: Any = load_heads(open_checkpoint(folder), model, provider(), "f32")
    return model, lambda r: HeadsDrafter("eagle", heads, provider(), r.kv, r.rows)


def medusa(folder: Path) -> Made:
    model = tiny_model(provider(), kind="f32")
    assert isinstance(model, Decoder)
    heads = load_heads(open_checkpoint(test_medusa.write(folder)), model, provider(), "f32")
    assert isinstance(heads, MedusaHeads)
    return model, lambda r: MedusaDrafter(heads, model.config.dim, provider(), r.rows)


def early(folder: Path) -> Made:
    model = tiny_model(provider(), kind="f32")
    assert isinstance(model, Decoder)
    return model, lambda r: EarlyExitDrafter(model, 1, provider(), r.kv, r.rows)


MAKERS = {one.__name__: one for one in (mtp, right, eagle, eagle3, medusa, early)}


@pytest.fixture(autouse=True)
def _all(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_all(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maker", MAKERS)
def test_bits_are_equal(maker: str, kind: str, tmp_path: Path) -> None:
    """Six at once, each preempted now and then; and again, when their prompts are in the cache."""
    prompts, params = (some[:6] for some in sixteen(kind))
    model, make = MAKERS[maker](tmp_path)
    plain = tiny_engine(model=model, speculation="off", max_rows=6)
    want = answers(plain, prompts, params)
    engine = tiny_engine(model=model, max_rows=6, drafting=Given(make))
    preempt_amid(engine)
    assert answers(engine, prompts, params) == want
    (stats,) = engine.runner.speculator.stats
    assert stats.seconds > 0, "nobody asked it"
    if maker == "right" and kind in ("greedy", "warm", "penalties"):
        assert stats.num_accepted > 0.7 * stats.num_drafted
    assert answers(engine, prompts, params) == want
    assert engine.runner.speculator.stats, "nobody failed"
