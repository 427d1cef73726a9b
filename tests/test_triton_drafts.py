"""Drafts on the provider for GPUs, under Triton's interpreter: with them an answer has the bits that it has
without, and each drafter says what it says on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("transformers")

import test_eagle
import test_medusa
from elinvar.base.config import EngineConfig
from elinvar.base.drafts import DraftStats
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.draft_model import SHARE, Loaded, drafter_of
from elinvar.engine.drafts import Drafting, Given
from elinvar.models.drafts import load_heads
from elinvar.ops import Ops, load_provider
from elinvar.run import costs
from elinvar.run.drafters.api import Ask, Drafter, Guess
from elinvar.run.drafters.early_exit import EarlyExitDrafter
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.run.drafters.medusa import MedusaDrafter
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.runner import Runner
from elinvar.weights.checkpoint import open_checkpoint
from engines import Answer, ByteTokenizer, answers, tiny_engine, tiny_parts
from families.base import VOCAB
from oracles import verify_all
from test_heads import model as mtp_model

Told = dict[tuple[int, int], list[int]]
"""What was guessed, by row and number of known tokens."""
Make = Callable[[Runner], Drafter]
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [(i * i * 7 + 3 * i + 5) % 250 for i in range(33)]]
PARAMS = [
    SamplingParams(max_tokens=5, temperature=0, seed=0, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=4, temperature=0.8, seed=1, ignore_eos=True, presence_penalty=0.4),
]


def llama(ops: Ops) -> Any:
    return tiny_parts("llama", "f32").build(ops)


def suffix(ops: Ops, folder: Path) -> tuple[Any, Make]:
    return llama(ops), lambda r: SuffixDrafter(r.rows)


def early_exit(ops: Ops, folder: Path) -> tuple[Any, Make]:
    model = llama(ops)
    return model, lambda r: EarlyExitDrafter(model, 1, ops, r.kv, r.rows, spare=r.spare)


def draft_model(ops: Ops, folder: Path) -> tuple[Any, Make]:
    """Of fewer tokens than the target has."""
    tokenizer: Any = ByteTokenizer()
    parts = tiny_parts("qwen2", "f32")
    loaded = Loaded(parts.build(ops), tokenizer, ops)
    sizes = VOCAB + 8, SHARE * 2**19
    return llama(ops), lambda r: drafter_of(loaded, r.rows, tokenizer, *sizes, EngineConfig())


def mtp(num_heads: int, is_right: bool = False) -> Callable[[Ops, Path], tuple[Any, Make]]:
    def make(ops: Ops, folder: Path) -> tuple[Any, Make]:
        model = mtp_model(num_heads, is_right, ops)
        return model, lambda r: HeadsDrafter("mtp", model, ops, r.kv, r.rows, r.spare)

    return make


def eagle(third: bool) -> Callable[[Ops, Path], tuple[Any, Make]]:
    def make(ops: Ops, folder: Path) -> tuple[Any, Make]:
        test_eagle.write(folder, third)
        model = llama(ops)
        heads: Any = load_heads(open_checkpoint(folder), model, ops, "f32")
        return model, lambda r: HeadsDrafter("eagle", heads, ops, r.kv, r.rows, r.spare)

    return make


def medusa(ops: Ops, folder: Path) -> tuple[Any, Make]:
    model = llama(ops)
    heads: Any = load_heads(open_checkpoint(test_medusa.write(folder)), model, ops, "f32")
    return model, lambda r: MedusaDrafter(heads, model.config.dim, ops, r.rows)


ALL = {
    "suffix": suffix,
    "early exit": early_exit,
    "draft model": draft_model,
    "mtp": mtp(2),
    "mtp, right": mtp(1, is_right=True),
    "eagle": eagle(third=False),
    "eagle3": eagle(third=True),
    "medusa": medusa,
}


@cache
def plain(name: str) -> list[Answer]:
    model = ALL[name](load_provider("cuda"), Path())[0] if name in ALL else None
    model = model or llama(load_provider("cuda"))
    return answers(tiny_engine(model=model, speculation="off"), PROMPTS, PARAMS)


@pytest.mark.parametrize("name", ALL)
def test_answers_are_those_without_drafts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_all(monkeypatch)
    # Beside such steps nobody sees how long drafting takes, which is not the same on both devices.
    monkeypatch.setattr(costs.Curve, "upto", lambda self, most: [1e6] * (most + 1))

    def drafted(device: Any) -> tuple[list[Answer], Told, DraftStats]:
        model, make = ALL[name](load_provider(device), tmp_path)
        told: Told = {}

        def watched(runner: Runner) -> Drafter:
            drafter = make(runner)
            propose = drafter.propose

            def telling(asks: Sequence[Ask]) -> list[Guess]:
                guesses = propose(asks)
                for ask, guess in zip(asks, guesses, strict=True):
                    told[ask.row, ask.num_tokens] = list(guess.tokens)
                return guesses

            drafter.propose = telling  # type: ignore[method-assign]
            return drafter

        engine = tiny_engine(model=model, max_drafts=2, drafting=Given(watched))
        found = answers(engine, PROMPTS, PARAMS)
        if name == "suffix":  # which knows what was said before
            found = answers(engine, PROMPTS, PARAMS)
        [stats] = engine.runner.speculator.stats
        return found, told, stats

    found, told, stats = drafted("cuda")
    assert found == plain(name if name.startswith("mtp") else "llama")
    # When they are asked is not the same on both devices.
    expected = drafted("cpu")[1]
    both = [(told[key], expected[key]) for key in told.keys() & expected.keys()]
    if name != "suffix":
        assert any(ours and theirs for ours, theirs in both)
        assert all(a == b for pair in both for a, b in zip(*pair, strict=False))
    assert stats.num_drafted > 0
    if name == "mtp, right":
        assert stats.num_accepted == stats.num_drafted


def test_an_engine_takes_heads_of_a_folder(tmp_path: Path) -> None:
    """Their weights are expected where the model's are, whose matrices stay."""
    test_medusa.write(tmp_path)
    config = EngineConfig(device="cuda", draft_model=str(tmp_path), max_rows=2, kv_memory=2**22)
    ops: Any = load_provider("cuda")
    model = llama(ops)
    expected = len(ops._expected)
    drafting = Drafting(config)
    drafting.open()
    tokenizer: Any = ByteTokenizer()
    engine = Engine(model, ops, tokenizer, config, drafting=drafting)
    assert [one.name for one in engine.runner.speculator.stats] == ["forced", "suffix", "medusa"]
    assert len(ops._expected) == expected + 3 * test_medusa.HEADS
    assert EngineConfig(device="cuda", speculation="mtp").drafters == ("mtp",)


@pytest.mark.parametrize(("speculation", "left"), [("auto", 80), ("model", 80), ("aside", 100)])
def test_a_draft_model_has_its_share_of_a_devices_memory(speculation: str, left: int) -> None:
    config = EngineConfig(device="cuda", speculation=speculation, draft_model="x")
    drafting = Drafting(config)
    assert drafting.leaves(100) == 100
    drafting._is_model = True
    assert drafting.leaves(100) == left
