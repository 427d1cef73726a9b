"""What clocks decide is decided by chance here: how much of a prompt a step computes, through how many
layers, how many drafts it verifies, what is begun ahead. Answers are equal, to the bit, of requests of every
kind that a step treats in its own way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest

from elinvar.base.errors import InputError
from elinvar.base.grammar import Regex
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES
from elinvar.run import speculation
from elinvar.run.drafters.api import Drafter
from elinvar.run.runner import Runner
from elinvar.sched.chunks import Chunks
from engines import tiny_engine
from late import LateOps
from oracles import Oracle, verify_all
from test_invariance import prompt

PROMPTS = [prompt(1, n) for n in (290, 199, 97, 193)] + [prompt(3, n) for n in (170, 66, 33, 1)]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "attention_budget": 97, "logprobs": 2},
    {"attention_budget": 1, "logprobs": 1},
    {"prompt_logprobs": 1, "logprobs": 1},
    {"attention_window": 64, "logprobs": 1},
    {"attention_budget": 64, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    {"grammar": Regex("(ab|cd)*x{30,90}")},
    {"temperature": 0, "logprobs": 3},
    {"top_p": 0.9, "stop": ("a",), "logprobs": 0},
]
WAITED_FOR = 4, 5
"""Nothing begins ahead of their tokens."""
PARAMS = [
    SamplingParams(**{"seed": i, "max_tokens": 36, "ignore_eos": True, **kind})
    for i, kind in enumerate(KINDS)
]
OPTIONS: list[dict[str, Any]] = [
    {"max_step_tokens": 33},
    {"prefix_cache": False, "max_rows": 3},
    {"max_step_tokens": 70, "num_blocks": 24, "max_context": 400},
    {"prefix_cache": False, "max_step_tokens": 48, "max_rows": 2},
]
OFTEN = "llama", "gemma3", "qwen3_next", "deepseek"
"""Full attention alone, beside windows, beside recurrent states, over latents."""
Answers = list[tuple[Any, ...]]


def asked_of(engine: Engine) -> list[SamplingParams]:
    """Without what the family refuses."""
    asked = PARAMS
    for field in ("attention_budget", "attention_window"):
        try:
            engine.check([1], SamplingParams(seed=0, **{field: 64}))
        except InputError:
            asked = [replace(one, **{field: None}) for one in asked]
    return asked


def answered(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], rng: Random
) -> Answers:
    """They come by and by, and now and then one has to go for a while."""
    waiting = list(zip(prompts, params, strict=True))
    builders: dict[str, CompletionBuilder] = {}
    done: dict[str, tuple[Any, ...]] = {}
    while waiting or engine.has_work:
        while waiting and (not engine.has_work or rng.random() < 0.3):
            ids, one = waiting.pop(0)
            builders[engine.add(ids, one)] = CompletionBuilder(ids)
        for delta in engine.step():
            if end := builders[delta.request_id].push(delta):
                done[delta.request_id] = end.token_ids, end.logprobs, end.prompt_logprobs, end.text
        running = [i for i in builders if i not in done]
        if running and rng.random() < 0.1:
            engine.scheduler.preempt(rng.choice(running))
        engine.scheduler.check()
    return [done[i] for i in builders]


class Calm(Random):
    """Nothing happens."""

    def random(self) -> float:
        return 1.0


def decide_by(rng: Random, plain: float, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what was decided. plain: share of the steps for which drafts promise nothing."""
    count: Counter[str] = Counter()

    def best(chains: dict[int, Any], rows: int, seconds: Sequence[float]) -> dict[int, int]:
        if rng.random() < plain:
            return {}
        counts = {i: rng.randint(0, len(chain.chances)) for i, chain in chains.items()}
        return {i: many for i, many in counts.items() if many}

    def reach(self: Chunks, limit: float | None, num_tokens: int, first: int) -> int:
        end = self.num_layers if limit is None else rng.randint(first + 1, self.num_layers)
        count["steps that end amid the layers"] += end < self.num_layers
        return end

    def in_wave(self: Chunks, limit: float) -> int:
        return int(limit) if rng.random() < 0.7 else rng.randint(1, 300)

    verify_all(monkeypatch)
    monkeypatch.setattr(speculation, "_best", best)
    limits = None, 0, 1, 2, 3, 7, 16, 33, 50, 200
    decided: dict[str, Callable[..., Any]] = {
        "limit": lambda *rest: rng.choice(limits),
        "in_wave": in_wave,
        "reach": reach,
        "beside_first": lambda *rest: rng.choice([None, 1, 5, 50]),
        "knows_quiet": lambda *rest: rng.random() < 0.8,
    }
    for name, decision in decided.items():
        monkeypatch.setattr(Chunks, name, decision)
    return count


_alone: dict[str, Answers] = {}


def expected(family: str) -> Answers:
    if family not in _alone:
        engine = tiny_engine(family, prefix_cache=False, speculation="off")
        asked = zip(PROMPTS, asked_of(engine), strict=True)
        _alone[family] = [answered(engine, [p], [s], Calm())[0] for p, s in asked]
    return _alone[family]


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        (family.name, seed)
        for family in FAMILIES
        for seed in range(4)
        if seed == 0 or family.name in OFTEN
    ],
)
def test_whatever_clocks_say(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    want, rng = expected(family), Random(seed)
    is_late = bool(seed % 2)
    count = decide_by(rng, 0.7 if is_late else 0.25, monkeypatch)
    known = [p + a[0] for p, a in zip(PROMPTS, want, strict=True)]

    def make(runner: Runner) -> Drafter:
        return Oracle(runner.rows, known, lambda index: rng.random() < 0.2)

    late = LateOps()
    engine = tiny_engine(
        family, ops=cast("Any", late if is_late else None), drafting=Given(make), **OPTIONS[seed]
    )
    params = asked_of(engine)
    asked = [i for i in range(len(PROMPTS)) if not is_late or i not in WAITED_FOR]
    for _ in range(2):
        order = rng.sample(asked, len(asked))
        found = answered(engine, [PROMPTS[i] for i in order], [params[i] for i in order], rng)
        assert found == [want[i] for i in order]
    assert count["steps that end amid the layers"] > 0 < engine.metrics.preemptions
    if not engine.scheduler.kv.has_states:
        [stats] = engine.runner.speculator.stats
        assert stats.num_drafted > stats.num_accepted > 0
        assert (late.num_ahead > 0) == is_late
