"""Speculation changes how many steps an answer takes, and nothing else: every comparison is == on the
bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters import adapted_engine
from all_drafters import ALL
from elinvar.base.grammar import JsonSchema, Regex
from elinvar.base.sampling import SamplingParams
from elinvar.base.thinking import ThinkingBudget
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.early_exit import EarlyExitDrafter
from elinvar.run.runner import Runner
from engines import ENGINES, Answer, answers, provider, tiny_engine
from oracles import Oracle, verify_all
from test_invariance import FAMILIES, PARAMS, PROMPTS, prompt

SCHEMA = '{"type":"object","properties":{"a":{"type":"string"},"b":{"enum":["long one","other"]}},"required":["b"]}'
KINDS = {
    "greedy": SamplingParams(max_tokens=40, temperature=0, seed=0, ignore_eos=True),
    "warm": SamplingParams(max_tokens=40, temperature=0.7, seed=1, ignore_eos=True),
    "hot, top-p": SamplingParams(max_tokens=40, temperature=1.2, top_p=0.9, seed=2),
    "penalties": SamplingParams(
        max_tokens=40,
        temperature=0.9,
        seed=3,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        bad_words=((5, 6), (7,)),
        min_tokens=12,
    ),
    "schema": SamplingParams(max_tokens=40, temperature=0.8, seed=4, grammar=JsonSchema(SCHEMA)),
    "regex": SamplingParams(
        max_tokens=40, temperature=1.0, seed=5, grammar=Regex("(ab|cd)*x{3,9}")
    ),
    "stop text": SamplingParams(max_tokens=40, temperature=1.0, seed=6, stop=("a", "\x01")),
    "stop token": SamplingParams(
        max_tokens=40, temperature=1.0, seed=7, stop_token_ids=tuple(range(20))
    ),
    "logprobs": SamplingParams(max_tokens=40, temperature=0.7, seed=8, logprobs=5, ignore_eos=True),
    "thinking": SamplingParams(
        max_tokens=40, temperature=1.0, seed=9, thinking=ThinkingBudget(6, (60,), (61, 62), True)
    ),
    "n=4": SamplingParams(max_tokens=30, temperature=0.8, seed=11, ignore_eos=True),
    "window": SamplingParams(
        max_tokens=40, temperature=0.7, seed=10, attention_window=64, ignore_eos=True
    ),
}


def sixteen(kind: str) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts about block borders, with seeds of their own; of `n=4` each is asked four times."""
    params = KINDS[kind]
    assert params.seed is not None
    copies = 4 if kind == "n=4" else 1
    prompts = [prompt(i // copies, 20 + 3 * (i // copies)) for i in range(16)]
    return prompts, [replace(params, seed=params.seed + 100 * i) for i in range(16)]


def plain(
    prompts: list[list[int]], params: list[SamplingParams], family: str = "llama"
) -> list[Answer]:
    return answers(tiny_engine(family, speculation="off", max_rows=16), prompts, params)


@pytest.fixture(autouse=True)
def _all(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_all(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", ALL)
def test_bits_are_equal(drafter: str, kind: str, tmp_path: Path) -> None:
    """Alone and sixteen at once, with preemptions and without, and again when all that was said is in the
    caches."""
    prompts, params = sixteen(kind)
    model, makers = ALL[drafter](tmp_path)
    want = answers(tiny_engine(model=model, speculation="off", max_rows=16), prompts, params)
    # What was computed behind a stop text is cut off: that no oracle knows.
    known = [p + a[0] for p, a in zip(prompts, want, strict=True)]
    for batch, preempt in ((1, False), (1, True), (16, False), (16, True)):
        engine = tiny_engine(model=model, max_rows=16, drafting=Given(*makers(known)))
        if preempt:
            preempt_amid(engine)
        for _ in range(2 if batch == 1 else 1):
            assert answers(engine, prompts[:batch], params[:batch]) == want[:batch]
        check(drafter, kind, engine, want[:batch])
        engine.close()


def check(drafter: str, kind: str, engine: Engine, want: list[Answer]) -> None:
    """It was asked, and what it knew was taken."""
    stats = {one.name: one for one in engine.runner.speculator.stats}
    if drafter.startswith("right") and any(len(answer[0]) > 8 for answer in want):
        assert stats["oracle"].num_accepted > 0
    if drafter == "AlwaysWrong" and KINDS[kind].grammar is None:
        assert stats[drafter].num_accepted <= stats[drafter].num_drafted // 8
    if drafter == "mtp, right" and kind in ("greedy", "warm", "penalties"):
        assert stats["mtp"].num_accepted > 0.7 * stats["mtp"].num_drafted
    if drafter == "Reader":
        assert drafter in stats, "it was shown what it follows, and nothing else"
    if drafter in ("Raises", "WrongCount", "NoGuesses") and len(want) == 16:
        assert drafter not in stats, "it failed and is asked no more"


def knowing(
    prompts: list[list[int]], found: list[Answer], is_instant: bool = True
) -> Callable[[Runner], Drafter]:
    """Wrong at each fifth token."""
    sequences = [p + a[0] for p, a in zip(prompts, found, strict=True)]
    return lambda runner: Oracle(runner.rows, sequences, lambda i: i % 5 == 3, is_instant)


def preempt_amid(engine: Engine) -> None:
    """Whoever runs for the longest goes, every fifth step."""
    begin, count = engine.runner.begin, 0

    def counted(plan):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        begun = begin(plan)
        if count % 5 == 4 and plan.items:
            engine.scheduler.preempt(plan.items[0].request_id)
        return begun

    engine.runner.begin = counted  # type: ignore[method-assign]


NO_STATES = [f for f in sorted(ENGINES) if ENGINES[f].delta is None]


@pytest.mark.parametrize("family", NO_STATES)
def test_every_family(family: str) -> None:
    """Windows, latents, experts, streams, sinks: spans of drafts are computed like any other."""
    prompts, params = PROMPTS, PARAMS
    want = plain(prompts, params, family)
    engine = tiny_engine(family, drafting=Given(knowing(prompts, want)))
    assert answers(engine, prompts, params) == want
    assert engine.runner.speculator.stats[0].num_accepted > 0


@pytest.mark.parametrize("kind", ["q5", "q8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"num_threads": 2}], ids=str)
def test_weights_caches_threads(kind: str, options: dict[str, Any]) -> None:
    threads = {"ops": provider("cpu", options["num_threads"])} if "num_threads" in options else {}
    kept = {name: value for name, value in options.items() if name != "num_threads"}
    want = answers(tiny_engine("gemma3", kind, speculation="off", **kept), PROMPTS, PARAMS)
    make = Given(knowing(PROMPTS, want, is_instant=False))
    assert (
        answers(tiny_engine("gemma3", kind, drafting=make, **kept, **threads), PROMPTS, PARAMS)
        == want
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_little_room(family: str) -> None:
    """Where blocks are short, or a step's tokens, drafts do without: nobody goes for them."""
    want = plain(PROMPTS, PARAMS, family)
    for options in (
        {"num_blocks": 9},
        {"max_step_tokens": 9},
        {"prefix_cache": False, "max_drafts": 1},
    ):
        make = Given(knowing(PROMPTS, want))
        assert answers(tiny_engine(family, drafting=make, **options), PROMPTS, PARAMS) == want


def test_states_are_not_drafted_for() -> None:
    want = plain(PROMPTS, PARAMS, "qwen3_next")
    engine = tiny_engine("qwen3_next", drafting=Given(knowing(PROMPTS, want)))
    assert answers(engine, PROMPTS, PARAMS) == want
    assert engine.runner.speculator.stats[0].num_drafted == 0


@pytest.mark.parametrize("drafter", ["right now and then", "auto", "model", "early exit"])
def test_adapters(drafter: str, tmp_path: Path) -> None:
    """Rows with one, rows with another and rows without, at once."""
    prompts = PROMPTS[:6]
    params = [
        replace(one, adapter=name)
        for one, name in zip(PARAMS[:6], ["one", "two", None] * 2, strict=True)
    ]
    want = answers(adapted_engine(speculation="off"), prompts, params)
    _, makers = ALL[drafter](tmp_path)
    known = [p + a[0] for p, a in zip(prompts, want, strict=True)]
    make = list(makers(known))
    if drafter == "early exit":  # of the adapted model itself
        make = [early]
    engine = adapted_engine(drafting=Given(*make))
    assert answers(engine, prompts, params) == want


def early(runner: Runner) -> Drafter:
    model: Any = runner.model
    return EarlyExitDrafter(model, 1, runner.ops, runner.kv, runner.rows, runner.adapted)
