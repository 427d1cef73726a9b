"""A request that sees its first and last tokens alone (docs/design/021): what it sees is a function of
positions, so its bits are the same however it is computed; its memory is bounded; what cannot be is
refused in one sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar import _cpu
from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.base.errors import InputError
from elinvar.base.plan import PlanItem, RowStart, StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from elinvar.ops.ref_attention import from_kv
from elinvar.run.rows import Rows
from engines import ENGINES, VOCAB, Answer, answers, provider, tiny_engine, tiny_model

FAMILIES = ("llama", "gemma3", "qwen3_next", "deepseek_v32")
"""Full attention alone, beside windows, beside recurrent states, to chosen keys."""
TAKES_IT = [f.name for f in REGISTRY if "chunked" not in ENGINES[f.name].layer_kinds]


def prompt(number: int, length: int) -> list[int]:
    return [(number * 31 + i * i * 7 + i) % VOCAB for i in range(length)]


def sees(window: int | None, sinks: int = 4, **params: Any) -> SamplingParams:
    both = {} if window is None else {"attention_window": window, "attention_sinks": sinks}
    return SamplingParams(**{"seed": 1, "logprobs": 2, "ignore_eos": True, **both, **params})


PROMPTS = [prompt(1, 150), prompt(1, 99), prompt(1, 200), prompt(1, 96), prompt(2, 70)]
PARAMS = [
    sees(32, max_tokens=60, temperature=0),
    sees(33, max_tokens=110),
    sees(64, 40, max_tokens=20, temperature=0.8),
    sees(1, max_tokens=40),
    sees(20, 5, max_tokens=70, seed=4),
]
PLAIN = [replace(p, attention_window=None, attention_sinks=4) for p in PARAMS]
_alone: dict[str, tuple[list[Answer], list[Answer]]] = {}


def expected(family: str) -> tuple[list[Answer], list[Answer]]:
    """With and without a window: alone, the prompt in one piece, nothing cached."""
    if family not in _alone:
        engine = tiny_engine(family, prefix_cache=False)
        _alone[family] = tuple(  # type: ignore[assignment]
            [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, params, strict=True)]
            for params in (PARAMS, PLAIN)
        )
    return _alone[family]


# ---- what is seen -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_attention_sees_what_is_kept_and_nothing_else(data: st.DataObject) -> None:
    """Rows gather what `attention` gets; against a softmax over the keys that the definition names.
    What lies elsewhere is NaN, and would show."""
    heads, dim = 2, 8
    spec = KVSpec("full", (0,), 1, dim, dtype="f32")
    rows = Rows(4, 512, [spec])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ops = provider(data.draw(st.sampled_from(["cpu", "ref"])))
    [kv] = ops.kv_layers(spec, 64)
    kv.k[:], kv.v[:] = np.nan, np.nan
    free = rng.permutation(64).tolist()
    items, kept = [], []
    for row in range(data.draw(st.integers(1, 4))):
        window = data.draw(st.sampled_from([None, 1, 32, 40, 100]))
        sinks = data.draw(st.sampled_from([1, 33]))
        params = sees(window, sinks)
        start = data.draw(st.integers(0, 400))
        stop = data.draw(st.integers(start + 1, min(start + 80, 480)))
        blocks = [-1 if _hidden(params, i, start) else free.pop() for i in range(-(-stop // 32))]
        rows.start(RowStart(f"r{row}", row, [0] * stop, params, [blocks]))
        items.append(PlanItem(f"r{row}", row, start, stop - start, False, [[]]))
        kept.append((params, blocks))
        for block in blocks:
            if block >= 0:
                kv.k[block] = rng.standard_normal(kv.k[block].shape, np.float32)
                kv.v[block] = rng.standard_normal(kv.v[block].shape, np.float32)
    batch, _, _ = rows.gather(items)
    seen = batch.sight or batch
    q_THD = rng.standard_normal((sum(i.num_tokens for i in items), heads, dim), np.float32)
    where = seen.query_start_loc, seen.seq_lens, seen.block_tables[0], seen.positions  # type: ignore[union-attr]
    got = ops.attention(q_THD, kv, *where, 0.3, None).reshape(-1, heads, dim)
    at = 0
    for item, (params, blocks) in zip(items, kept, strict=True):
        for position in range(item.start, item.start + item.num_tokens):
            keys = [
                j for j in range(position + 1) if not _hidden(params, j // BLOCK_SIZE, position)
            ]
            k = np.array([kv.k[blocks[j // 32], 0, :, j % 32] for j in keys])
            v = np.array([kv.v[blocks[j // 32], 0, j % 32, :dim] for j in keys])
            p = np.exp(q_THD[at] @ from_kv(k, "f32").T * 0.3)
            np.testing.assert_allclose(got[at], p / p.sum(-1, keepdims=True) @ v, atol=1e-5)
            at += 1


def _hidden(params: SamplingParams, block: int, position: int) -> bool:
    """The definition."""
    if params.attention_window is None:
        return False
    first = -(-params.attention_sinks // BLOCK_SIZE)
    last = position // BLOCK_SIZE - -(-params.attention_window // BLOCK_SIZE)
    return first <= block < last


def test_at_least_the_window_and_the_sinks_are_seen() -> None:
    for position in range(300):
        blocks = [not _hidden(sees(50, 4), j // BLOCK_SIZE, position) for j in range(position + 1)]
        assert all(blocks[:4]) and all(blocks[-50:]) and sum(blocks) <= 32 + 64 + 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_that_holds_everything_changes_nothing(family: str) -> None:
    _, plain = expected(family)
    wide = [
        replace(p, attention_window=w)
        for p, w in zip(PARAMS, (145, 160, 2**31 - 1, 97, 77), strict=True)
    ]
    assert answers(tiny_engine(family, max_step_tokens=50), PROMPTS, wide) == plain


# ---- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TAKES_IT)
def test_every_family_in_chunks_and_beside_others(family: str) -> None:
    narrow, plain = expected(family)
    assert [a != b for a, b in zip(narrow, plain, strict=True)] == [True] * 5
    engine = tiny_engine(family, ops=provider(num_threads=3), max_step_tokens=21)
    for _ in range(2):  # the second time prefixes are found
        assert answers(engine, PROMPTS + PROMPTS, PARAMS + PLAIN) == narrow + plain


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunk_sizes(family: str, chunk: int) -> None:
    engine = tiny_engine(family, prefix_cache=False, max_step_tokens=chunk, max_rows=3)
    assert answers(engine, PROMPTS, PARAMS) == expected(family)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_found_among_requests_that_see_the_same(family: str) -> None:
    narrow, plain = expected(family)
    engine = tiny_engine(family)

    def cached(which: list[SamplingParams]) -> list[int]:
        found = []
        for ids, params, want in zip(PROMPTS, which, (plain, narrow)[which is PARAMS], strict=True):
            before = engine.metrics.cached_tokens
            assert answers(engine, [ids], [params]) == [want]
            found.append(engine.metrics.cached_tokens - before)
        return found

    cached(PLAIN)
    assert cached(PARAMS)[0] == 0, "what was computed seeing everything is not theirs"
    assert min(cached(PARAMS)) >= 32
    wider = replace(PARAMS[0], attention_window=100)
    before = engine.metrics.cached_tokens
    answers(engine, [PROMPTS[0]], [wider])
    assert engine.metrics.cached_tokens == before


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str, prefix_cache: bool) -> None:
    engine = tiny_engine(family, prefix_cache=prefix_cache, max_step_tokens=40)
    builders = {
        engine.add(p, s): CompletionBuilder(p) for p, s in zip(PROMPTS, PARAMS, strict=True)
    }
    done: dict[str, Answer] = {}
    for step in range(10_000):
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = (
                    completion.token_ids,
                    completion.logprobs,
                    completion.text,
                )
        running = [i for i in builders if i not in done][1:]
        if running and step % 3 == 0:
            engine.scheduler.preempt(running[step // 3 % len(running)])
        engine.scheduler.check()
        if not engine.has_work:
            break
    assert engine.metrics.preemptions > 0
    assert [done[i] for i in builders] == expected(family)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_so_short_that_requests_push_each_other_out(family: str) -> None:
    narrow, plain = expected(family)
    engine = tiny_engine(family, num_blocks=9, max_context=240, max_step_tokens=64)
    assert answers(engine, PROMPTS + PROMPTS, PARAMS + PLAIN) == narrow + plain


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_below_the_cache_is_fetched(family: str) -> None:
    """Also what a request that forgets needs of it, and no more."""
    narrow, plain = expected(family)
    engine = tiny_engine(
        family, num_blocks=9, max_context=240, max_step_tokens=64, kv_host_memory=2**24
    )
    below = engine.scheduler.kv._below
    assert below is not None
    below.compute_s = lambda start, end: math.inf  # however slow the machine: fetch
    plans: list[StepPlan] = []
    begin = engine.runner.begin
    engine.runner.begin = lambda plan: (plans.append(plan), begin(plan))[1]  # type: ignore[method-assign]
    for _ in range(2):
        assert answers(engine, PROMPTS + PROMPTS, PARAMS + PLAIN) == narrow + plain
    assert sum(len(plan.loads) for plan in plans) > 0
    engine.close()


@pytest.mark.parametrize("level", _cpu.available())
def test_vector_width(level: str) -> None:
    engine = tiny_engine("llama", ops=provider("cpu", 1, level), max_step_tokens=50)
    assert answers(engine, PROMPTS, PARAMS) == expected("llama")[0]


# ---- bounded memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_of_ten_times_the_cache(family: str) -> None:
    model = tiny_model(provider(), family)
    model.config = replace(model.config, max_context=2048)
    roomy = tiny_engine(model=model)
    small = tiny_engine(model=model, num_blocks=4, max_step_tokens=100)
    ids, params = prompt(1, 20), sees(32, max_tokens=1300, logprobs=0)
    assert small.max_context < 150 or family == "qwen3_next"  # its states take most of the memory
    small.add(ids, params)
    most, builder = 0, CompletionBuilder(ids)
    while small.has_work:
        for delta in small.step():
            completion = builder.push(delta)
        small.scheduler.check()
        pool = small.scheduler.kv.pools[0]
        most = max(most, pool.num_blocks - pool.num_free)
    assert completion is not None and len(completion.token_ids) == 1300
    assert most == 3, "sinks, window, and the block of the last token"
    [(token_ids, logprobs, _)] = answers(roomy, [ids], [params])
    assert (completion.token_ids, completion.logprobs) == (token_ids, logprobs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v32"])
def test_a_prompt_longer_than_the_cache(family: str) -> None:
    ids, params = prompt(3, 450), sees(32, max_tokens=40)
    small = tiny_engine(family, num_blocks=4, max_step_tokens=512)
    for _ in range(2):
        assert answers(small, [ids], [params]) == answers(tiny_engine(family), [ids], [params])
    cached = small.metrics.cached_tokens
    assert cached > 400, "its first and last blocks suffice to go on"


# ---- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    small = tiny_engine(num_blocks=4)
    with pytest.raises(InputError, match="KV cache") as error:
        small.add(prompt(1, 450), sees(100))  # needs 6 blocks
    assert error.value.field == "prompt"
    with pytest.raises(InputError, match="context") as error:
        small.add(prompt(1, 512), sees(32))
    assert error.value.field == "prompt"
    assert small.context_of(sees(32)) == 512 and small.context_of(sees(None)) == small.max_context


@pytest.mark.parametrize("family", ["llama4"])
def test_models_that_take_no_window_say_why(family: str) -> None:
    engine: Engine = tiny_engine(family)
    with pytest.raises(InputError, match=r"chunks.*leave attention_window out") as error:
        engine.add([1, 2], sees(64))
    assert error.value.field == "attention_window"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("attention_window", {"attention_window": 0}),
        ("attention_window", {"attention_window": 64.0}),
        ("attention_window", {"attention_window": True}),
        ("attention_sinks", {"attention_window": 64, "attention_sinks": 0}),
        ("attention_sinks", {"attention_sinks": 8}),
    ],
)
def test_parameters_out_of_range(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**values)
    assert error.value.field == field
