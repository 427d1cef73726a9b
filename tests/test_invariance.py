"""The contract: a request's tokens and log-probs are a function of its token ids, its sampling
parameters and its seed alone. Every comparison here is == on the bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar import _cpu
from elinvar.base.grammar import Regex
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from engines import VOCAB, Answer, answers, provider, tiny_engine

FAMILIES = ("llama", "gemma3", "qwen3_next")
"""Full attention alone, with windows, with recurrent states: these go through everything, all others
through test_every_family."""
LEVELS = [level for level in ("scalar", "avx2", "avx512", "neon") if level in _cpu.available()]


def prompt(number: int, length: int) -> list[int]:
    return [(number * 31 + i * i * 7 + i) % VOCAB for i in range(length)]


# Prompts longer than gemma3's window of 40, around block borders, and sharing long prefixes.
PROMPTS = [
    *(prompt(1, length) for length in (1, 31, 32, 33, 97, 150)),
    prompt(1, 64) + prompt(2, 50),
    prompt(3, 45),
]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, seed=1, logprobs=0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.8, top_k=20, seed=2, logprobs=5, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.3, min_p=0.05, seed=-3, logprobs=1),
    SamplingParams(max_tokens=7, temperature=1.0, seed=2**64 - 1, logprobs=2),
    SamplingParams(max_tokens=33, temperature=0.8, top_p=0.95, top_k=40, seed=9, logprobs=0),
    SamplingParams(max_tokens=40, temperature=0.7, seed=11, logprobs=20, ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=0, logprobs=1),
]
for one in PARAMS:
    if one.temperature == 0:
        object.__setattr__(one, "seed", 0)


def alone(engine: Engine) -> list[Answer]:
    return [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]


_alone: dict[tuple[str, str, str], list[Answer]] = {}


def expected(family: str, kind: str = "q4", kv_dtype: str = "f16") -> list[Answer]:
    """Every request by itself, the prompt in one piece, nothing cached, one thread."""
    key = (family, kind, kv_dtype)
    if key not in _alone:
        engine = tiny_engine(family, kind, kv_dtype=kv_dtype, prefix_cache=False)
        _alone[key] = alone(engine)
    return _alone[key]


def together(engine: Engine) -> list[Answer]:
    return answers(engine, PROMPTS, PARAMS)


@pytest.mark.parametrize("kind", ["q4", "q5", "q8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_composition(family: str, kind: str) -> None:
    assert together(tiny_engine(family, kind)) == expected(family, kind)


@pytest.mark.parametrize("kind", ["q4", "f32"])
@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_every_family(family: str, kind: str) -> None:
    """In a batch, in chunks that cut blocks and windows, on more threads, with prefixes reused."""
    engine = tiny_engine(family, kind, provider(num_threads=3), max_step_tokens=21)
    assert together(engine) == expected(family, kind)
    assert together(engine) == expected(family, kind)


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_dtypes(family: str, kv_dtype: str) -> None:
    engine = tiny_engine(family, kv_dtype=kv_dtype, max_step_tokens=20)
    assert together(engine) == expected(family, kv_dtype=kv_dtype)


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_every_family_with_an_int8_cache(family: str) -> None:
    """Windows, sinks, latents and chosen keys too: a token's codes depend on that token alone."""
    for level in LEVELS:
        ops = provider("cpu", 3, level)
        engine = tiny_engine(family, "q4", ops, kv_dtype="int8", max_step_tokens=21)
        for _ in range(2):  # the second time with prefixes of the first
            assert together(engine) == expected(family, "q4", "int8")


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunk_sizes(family: str, chunk: int) -> None:
    engine = tiny_engine(family, prefix_cache=False, max_step_tokens=chunk)
    assert alone(engine) == expected(family)
    engine = tiny_engine(family, max_step_tokens=chunk, max_rows=3)
    assert together(engine) == expected(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_hit_or_miss(family: str) -> None:
    engine = tiny_engine(family)
    assert alone(engine) == expected(family)
    before = engine.metrics.cached_tokens
    assert together(engine) == expected(family)
    assert engine.metrics.cached_tokens - before >= 32 * 8, "the second round must hit"


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_a_hit_amid_a_block(family: str) -> None:
    """Others go on from the middle of a block: of one that was filled, of one that an answer ended in,
    of one that is being written."""
    has_states = tiny_engine(family).model_config.delta is not None
    one = SamplingParams(max_tokens=9, temperature=0.8, seed=4, logprobs=2, ignore_eos=True)
    first = prompt(5, 75)
    engine = tiny_engine(family)
    [(ids, _, _)] = answers(engine, [first], [one])
    known = first + ids
    branches = [known[:cut] + prompt(6, 40) for cut in (45, 70, 83)]
    wanted = [
        answers(tiny_engine(family, prefix_cache=False), [branch], [one])[0] for branch in branches
    ]
    before = engine.metrics.cached_tokens
    assert [answers(engine, [branch], [one])[0] for branch in branches] == wanted
    found = engine.metrics.cached_tokens - before
    assert found == (64 + 83 if has_states else 45 + 70 + 83)


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_forks_of_one_prompt(family: str) -> None:
    """Those that arrive together compute their prompt once."""
    params = [
        SamplingParams(max_tokens=9, temperature=0.9, seed=seed, logprobs=1, ignore_eos=True)
        for seed in range(4)
    ]
    first = prompt(7, 75)
    alone = tiny_engine(family, prefix_cache=False)
    wanted = [answers(alone, [first], [one])[0] for one in params]
    engine = tiny_engine(family)
    assert answers(engine, [first] * 4, params) == wanted
    found = 64 if engine.model_config.delta else 74
    assert engine.metrics.cached_tokens == 3 * found


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str, prefix_cache: bool, every: int) -> None:
    engine = tiny_engine(family, prefix_cache=prefix_cache, max_step_tokens=40)
    builders = {
        engine.add(p, s): CompletionBuilder(p) for p, s in zip(PROMPTS, PARAMS, strict=True)
    }
    done = {}
    step = 0
    while engine.has_work:
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = completion
        # The oldest is left alone, so that the test ends.
        running = [i for i in builders if i not in done][1:]
        if running and step % every == 0:
            engine.scheduler.preempt(running[step // every % len(running)])
        step += 1
    assert engine.metrics.preemptions > 0
    got = [(done[i].token_ids, done[i].logprobs, done[i].text) for i in builders]
    assert got == expected(family)


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_memory_so_short_that_requests_push_each_other_out(family: str) -> None:
    prompts = [prompt(i, 20 + i) for i in range(6)]
    params = [
        SamplingParams(max_tokens=110, temperature=0.9, seed=i, logprobs=1, ignore_eos=True)
        for i in range(6)
    ]
    roomy = tiny_engine(family, prefix_cache=False)
    wanted = [answers(roomy, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    tight = tiny_engine(family, num_blocks=8, max_context=140, max_step_tokens=64)
    assert answers(tight, prompts, params) == wanted
    assert tight.metrics.preemptions > 0


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["q4", "f16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads(family: str, kind: str, num_threads: int) -> None:
    engine = tiny_engine(family, kind, provider("cpu", num_threads))
    assert together(engine) == expected(family, kind)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["q4", "q5", "q8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vector_width(family: str, kind: str, level: str) -> None:
    engine = tiny_engine(family, kind, provider("cpu", 1, level), max_step_tokens=50)
    assert together(engine) == expected(family, kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_agrees(family: str) -> None:
    """`ref` computes in float64 through BLAS, whose last bit may depend on the batch: tokens are
    the same, log-probs nearly so. Its noise and filters are those of `cpu`."""
    engine = tiny_engine(family, "f32", provider("ref"), kv_dtype="f32", max_step_tokens=40)
    got = together(engine)
    for (ids, logprobs, text), (ref_ids, ref_logprobs, ref_text) in zip(
        expected(family, "f32", "f32"), got, strict=True
    ):
        assert (ref_ids, ref_text) == (ids, text)
        for one, other in zip(logprobs, ref_logprobs, strict=True):
            assert other.logprob == pytest.approx(one.logprob, rel=1e-4)


def test_the_seed_matters_and_is_all_that_does() -> None:
    engine = tiny_engine()
    params = [SamplingParams(max_tokens=20, seed=s, ignore_eos=True) for s in (5, 5, 6)]
    first, second, third = answers(engine, [prompt(1, 40)] * 3, params)
    assert first == second != third


def test_logprobs_asked_for_by_others_change_nothing() -> None:
    engine = tiny_engine()
    base = {"max_tokens": 20, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    params = [SamplingParams(**base, logprobs=k) for k in (None, 0, 2, 20)]
    none, zero, two, twenty = answers(engine, [prompt(4, 20)] * 4, params)
    assert none[0] == zero[0] == two[0] == twenty[0]
    assert none[1] == []
    assert [t.logprob for t in zero[1]] == [t.logprob for t in twenty[1]]
    assert [t.top for t in two[1]] == [t.top[:2] for t in twenty[1]]


# ---- a random life of an engine ---------------------------------------------------------------

# Some forget what lies between their first and their last tokens, some what their prompts' ends do not
# attend to, some keep to a grammar.
GRAMMAR = Regex("[a-f]*(,[a-f]{2})*")
LIVES = [
    *PARAMS,
    *(replace(PARAMS[i], attention_window=32) for i in (1, 3, 6)),
    *(replace(PARAMS[i], attention_budget=1) for i in (1, 5, 6)),
    *(replace(PARAMS[i], grammar=GRAMMAR) for i in (0, 3, 5)),
]
REQUESTS = st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, len(LIVES) - 1))
EVENTS = st.one_of(
    st.tuples(st.just("add"), REQUESTS),
    st.tuples(st.just("add"), REQUESTS),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("preempt"), st.integers(0, 5)),
)
_pairs: dict[tuple[str, int, int], Answer] = {}


def by_itself(family: str, which: int, params: int) -> Answer:
    key = (family, which, params)
    if key not in _pairs:
        engine = tiny_engine(family, prefix_cache=False)
        _pairs[key] = answers(engine, [PROMPTS[which]], [LIVES[params]])[0]
    return _pairs[key]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(EVENTS, min_size=10, max_size=50),
    num_blocks=st.integers(8, 24),
    rows=st.integers(1, 5),
    chunk=st.sampled_from([1, 16, 33, 100]),
    waves=st.none() | st.integers(0, 99),
)
def test_arrivals_cancellations_and_preemptions(
    family: str,
    events: list[tuple[str, Any]],
    num_blocks: int,
    rows: int,
    chunk: int,
    waves: int | None,
) -> None:
    engine = tiny_engine(
        family, num_blocks=num_blocks, max_context=200, max_rows=rows, max_step_tokens=chunk
    )
    if waves is not None:  # prompts go through the layers by and by, whatever steps take
        limits = Random(waves)
        engine.scheduler.chunks.limit = (  # type: ignore[method-assign]
            lambda *args: limits.choice([0, 0.5, 2, 8, None])
        )
    life = Life(engine)
    for event, value in events:
        getattr(life, event)(value)
        engine.scheduler.check()
    while engine.has_work:
        life.step(1)
    for request_id, (which, params) in life.asked.items():
        ids, logprobs, text = by_itself(family, which, params)
        builder = life.builders[request_id]
        got = len(builder.token_ids)
        if request_id not in life.aborted:
            assert got == len(ids)
            assert "".join(builder.texts) == text
        assert builder.token_ids == ids[:got]
        assert builder.logprobs == logprobs[:got]
    assert engine.scheduler.kv_usage == 0


class Life:
    """An engine and what its requests have said so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked: dict[str, tuple[int, int]] = {}
        self.builders: dict[str, CompletionBuilder] = {}
        self.aborted: set[str] = set()
        self.finished: set[str] = set()

    def add(self, request: tuple[int, int]) -> None:
        which, params = request
        request_id = self.engine.add(PROMPTS[which], LIVES[params])
        self.asked[request_id] = request
        self.builders[request_id] = CompletionBuilder(PROMPTS[which])

    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.engine.step():
                if self.builders[delta.request_id].push(delta):
                    self.finished.add(delta.request_id)

    def abort(self, index: int) -> None:
        if alive := self._alive():
            request_id = alive[index % len(alive)]
            assert self.engine.abort(request_id)
            self.aborted.add(request_id)

    def preempt(self, index: int) -> None:
        if alive := self._alive():
            self.engine.scheduler.preempt(alive[index % len(alive)])

    def _alive(self) -> list[str]:
        return [i for i in self.asked if i not in self.aborted and i not in self.finished]


# ---- a real model -------------------------------------------------------------------------------


def test_a_real_model(smollm2_gguf: Path) -> None:
    from elinvar.base.config import EngineConfig

    def load(**options: Any) -> Engine:
        return Engine.load(str(smollm2_gguf), EngineConfig(kv_memory=2**28, **options))

    engine = load(num_threads=1, prefix_cache=False)
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, " * 12]
    prompts = [engine.tokenizer.encode(text) for text in texts]
    params = [
        SamplingParams(max_tokens=16, temperature=0, seed=0, logprobs=2),
        SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=1, logprobs=2),
        SamplingParams(max_tokens=16, temperature=1.0, top_k=50, seed=2, logprobs=2),
    ]
    wanted = [answers(engine, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    for options in (
        {"num_threads": 2, "max_step_tokens": 7},
        {"num_threads": 4, "max_rows": 2, "max_step_tokens": 32},
    ):
        other = load(**options)
        assert answers(other, prompts, params) == wanted
        assert answers(other, prompts, params) == wanted
