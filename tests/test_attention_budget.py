"""A request whose answer sees the blocks of its prompt that the prompt's end attends to most
(docs/design/028): the choice is the definition's, a function of the prompt alone, so bits are the same
however it is computed; what was not chosen is given back; what cannot be is refused in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar import _cpu
from elinvar.base.config import BLOCK_SIZE
from elinvar.base.errors import InputError
from elinvar.base.plan import StepOutput
from elinvar.base.sampling import WATCHED, SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from elinvar.ops.ref_attention import read_keys
from elinvar.run.ahead import Begun
from elinvar.run.drafters.api import Drafter
from elinvar.run.runner import Runner
from elinvar.run.watches import most_seen
from engines import ENGINES, VOCAB, Answer, answers, provider, tiny_engine
from oracles import Oracle, verify_all

FAMILIES = ("llama", "gemma3", "qwen3_next", "deepseek")
"""Full attention alone, beside windows, beside recurrent states, over latents."""
TAKES_IT = [
    f.name
    for f in REGISTRY
    if "chunked" not in ENGINES[f.name].layer_kinds and ENGINES[f.name].index is None
]


def prompt(number: int, length: int) -> list[int]:
    return [(number * 31 + i * i * 7 + i) % VOCAB for i in range(length)]


def keeps(budget: int | None, **params: Any) -> SamplingParams:
    shared = {"seed": 1, "logprobs": 2, "ignore_eos": True}
    return SamplingParams(attention_budget=budget, **{**shared, **params})


PROMPTS = [prompt(1, 290), prompt(1, 199), prompt(1, 256), prompt(1, 192), prompt(2, 170)]
PARAMS = [
    keeps(128, max_tokens=60, temperature=0),
    keeps(1, max_tokens=110),
    keeps(97, max_tokens=20, temperature=0.8),
    keeps(100, max_tokens=40),
    keeps(64, max_tokens=70, seed=4),
]
PLAIN = [replace(p, attention_budget=None) for p in PARAMS]
_alone: dict[str, tuple[list[Answer], list[Answer]]] = {}


def expected(family: str) -> tuple[list[Answer], list[Answer]]:
    """With and without a budget: alone, the prompt in one piece, nothing cached."""
    if family not in _alone:
        engine = tiny_engine(family, prefix_cache=False)
        _alone[family] = tuple(  # type: ignore[assignment]
            [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, params, strict=True)]
            for params in (PARAMS, PLAIN)
        )
    return _alone[family]


def outputs_of(engine: Engine) -> list[StepOutput]:
    """All that the runner says from now on."""
    outputs: list[StepOutput] = []
    begin = engine.runner.begin

    def spy(plan: Any) -> Begun:
        begun = begin(plan)
        outputs.append(begun.finish())
        return begun

    engine.runner.begin = spy  # type: ignore[method-assign]
    return outputs


# ---- what is chosen -----------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 400))
def test_how_many_blocks_are_kept(budget: int, length: int) -> None:
    kept, num_blocks = keeps(budget).kept_of_prompt(length), -(-length // BLOCK_SIZE)
    if kept is None:
        assert num_blocks <= max(3, -(-budget // BLOCK_SIZE))
    else:
        assert budget <= kept * BLOCK_SIZE and kept <= max(3, -(-budget // BLOCK_SIZE))
        assert kept < num_blocks
        # The first block and those of the last tokens fit.
        always = {0, *(i // BLOCK_SIZE for i in range(length - WATCHED, length))}
        assert len(always) <= kept
    assert keeps(None).kept_of_prompt(length) is None


def test_the_largest_shares_are_kept_of_equal_ones_the_earlier() -> None:
    def chosen(shares: list[float], num_tokens: int, count: int) -> list[int]:
        return most_seen(np.array(shares, np.float32), num_tokens, count)

    assert chosen([0, 1, 5, 1, 3, 0, 0], 7 * 32, 4) == [0, 2, 4, 6]
    assert chosen([0, 1, 5, 1, 3, 0, 0], 7 * 32 - 1, 4) == [0, 2, 5, 6]
    assert chosen([0, 1, 1, 1, 1, 1, 0], 7 * 32, 5) == [0, 1, 2, 3, 6]
    assert chosen([9, 9, 0, 0], 4 * 32, 2) == [0, 3]


class Attended:
    """A provider that notes the queries of the last tokens of a prompt, and the keys they see."""

    def __init__(self, inner: Any, num_tokens: int) -> None:
        self.inner, self.num_tokens = inner, num_tokens
        self.shares: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def attention(self, q_THD: Any, kv: Any, *where: Any, **switches: Any) -> Any:
        _, lens, tables, positions, scale, window = where
        if window is None and lens[0] == self.num_tokens:
            blocks = tables[0, : -(-self.num_tokens // BLOCK_SIZE)]
            keys = (
                read_keys(kv, blocks)
                .transpose(1, 0, 3, 2)
                .reshape(kv.k.shape[1], -1, q_THD.shape[2])
            )
            group = q_THD.shape[1] // len(keys)
            for t in range(len(positions) - WATCHED, len(positions)):
                last = int(positions[t])
                for h in range(q_THD.shape[1]):
                    s = keys[h // group, : last + 1].astype(np.float64) @ q_THD[t, h] * scale
                    weights = np.exp(s - s.max())
                    padded = np.zeros(len(blocks) * BLOCK_SIZE)
                    padded[: last + 1] = weights / weights.sum()
                    self.shares.append(padded.reshape(-1, BLOCK_SIZE).sum(-1))
        return self.inner.attention(q_THD, kv, *where, **switches)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_is_that_of_the_definition(family: str) -> None:
    for ids, params in zip(PROMPTS, PARAMS, strict=True):
        ops: Any = Attended(provider(), len(ids))
        engine = tiny_engine(family, ops=ops, max_step_tokens=512)
        if family == "qwen3_next":  # its chunks end on borders: the last one is not all of them
            ops.num_tokens = -1
        outputs = outputs_of(engine)
        answers(engine, [ids], [params])
        [kept] = [blocks for output in outputs for blocks in output.kept.values()]
        count = params.kept_of_prompt(len(ids))
        assert count == len(kept) and kept == sorted(kept) and kept[0] == 0
        assert set(range((len(ids) - WATCHED) // BLOCK_SIZE, -(-len(ids) // BLOCK_SIZE))) <= {*kept}
        if ops.shares:
            total = np.max(ops.shares, axis=0).astype(np.float32)
            assert kept == most_seen(total, len(ids), count)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_that_holds_everything_changes_nothing(family: str) -> None:
    _, plain = expected(family)
    wide = [
        replace(p, attention_budget=b)
        for p, b in zip(PARAMS, (289, 200, 2**31 - 1, 161, 163), strict=True)
    ]
    assert answers(tiny_engine(family, max_step_tokens=50), PROMPTS, wide) == plain


# ---- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TAKES_IT)
def test_every_family_in_chunks_and_beside_others(family: str) -> None:
    chosen, plain = expected(family)
    for with_budget, without in zip(chosen, plain, strict=True):
        assert with_budget[0][0] == without[0][0], "the first token has seen everything"
        assert with_budget != without
    engine = tiny_engine(family, ops=provider(num_threads=3), max_step_tokens=21)
    for _ in range(2):  # the second time prefixes are found
        assert answers(engine, PROMPTS + PROMPTS, PARAMS + PLAIN) == chosen + plain


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunk_sizes(family: str, chunk: int) -> None:
    engine = tiny_engine(family, prefix_cache=False, max_step_tokens=chunk, max_rows=3)
    assert answers(engine, PROMPTS, PARAMS) == expected(family)[0]


def test_prompts_whose_tokens_are_scored() -> None:
    """They are computed in pieces, whatever is cached."""
    engine = tiny_engine(max_step_tokens=50)
    scored = [replace(p, prompt_logprobs=1) for p in PARAMS]
    for _ in range(2):
        assert answers(engine, PROMPTS, scored) == expected("llama")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a last token that is computed by itself, as any that decodes, there are none: what they would
    see is not chosen yet."""
    verify_all(monkeypatch)
    known = [p + a[0] for p, a in zip(PROMPTS, expected(family)[0], strict=True)]

    def make(runner: Runner) -> Drafter:
        return Oracle(runner.rows, known, lambda index: index % 5 == 3)

    for chunk in (17, 33):  # they leave one token of the first prompt, and one of the second
        options = {"prefix_cache": False, "max_step_tokens": chunk, "max_rows": 1}
        engine = tiny_engine(family, drafting=Given(make), **options)
        for _ in range(2):  # the second time it is known how long steps take
            assert answers(engine, PROMPTS, PARAMS) == expected(family)[0]
        accepted = engine.runner.speculator.stats[0].num_accepted
        assert accepted > 0 or family == "qwen3_next"


@pytest.mark.parametrize("dtype", ["int8", "f32"])
def test_kinds_of_cache(dtype: str) -> None:
    alone = tiny_engine(prefix_cache=False, kv_dtype=dtype)
    chosen = [answers(alone, [p], [s])[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    engine = tiny_engine(kv_dtype=dtype, max_step_tokens=45)
    for _ in range(2):
        assert answers(engine, PROMPTS, PARAMS) == chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_shared_with_everybody_and_answers_with_nobody(family: str) -> None:
    chosen, plain = expected(family)
    engine = tiny_engine(family)

    def cached(ids: list[int], params: SamplingParams, want: Answer | None = None) -> int:
        before = engine.metrics.cached_tokens
        found = answers(engine, [ids], [params])
        assert want is None or found == [want]
        return engine.metrics.cached_tokens - before

    # qwen3_next begins where a state was left: on borders, and behind a prompt on its last one.
    hybrid = family == "qwen3_next"
    border = 32 if hybrid else 1
    assert cached(PROMPTS[0], PARAMS[0], chosen[0]) == 0
    assert cached(PROMPTS[0], PLAIN[0], plain[0]) >= 258 // border * border
    assert cached(PROMPTS[0], PARAMS[0], chosen[0]) == 258 // border * border
    assert cached(PROMPTS[4], PLAIN[4], plain[4]) == 0
    assert cached(PROMPTS[4], PARAMS[4], chosen[4]) == (0 if hybrid else 170 - WATCHED)
    # A conversation that goes on: what the answer wrote saw a part.
    engine = tiny_engine(family)
    cached(PROMPTS[1], PARAMS[1], chosen[1])
    longer = PROMPTS[1] + chosen[1][0] + [5]
    alone = answers(tiny_engine(family, prefix_cache=False), [longer], [PLAIN[0]])
    assert cached(longer, PLAIN[0], alone[0]) <= 199


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str, prefix_cache: bool) -> None:
    """Amid prompts and answers."""
    engine = tiny_engine(family, prefix_cache=prefix_cache, max_step_tokens=40)
    builders = {
        engine.add(p, s): CompletionBuilder(p) for p, s in zip(PROMPTS, PARAMS, strict=True)
    }
    done: dict[str, Answer] = {}
    for step in range(10_000):
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                answer = completion.token_ids, completion.logprobs, completion.text
                done[delta.request_id] = answer
        running = [i for i in builders if i not in done][1:]
        if running and step % 11 == 0:
            engine.scheduler.preempt(running[step // 11 % len(running)])
        engine.scheduler.check()
        if not engine.has_work:
            break
    assert engine.metrics.preemptions > 5
    assert [done[i] for i in builders] == expected(family)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_so_short_that_requests_push_each_other_out(family: str) -> None:
    """Answers that grow, behind prompts of which little is left."""
    prompts = [prompt(number, 130) for number in range(4)]
    params = [keeps(1, max_tokens=200), keeps(None, max_tokens=200)] * 2
    roomy = tiny_engine(family, prefix_cache=False)
    alone = [answers(roomy, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    engine = tiny_engine(family, num_blocks=13, max_context=352, max_step_tokens=64)
    assert answers(engine, prompts, params) == alone
    assert engine.metrics.preemptions > 0 or family in ("gemma3", "qwen3_next")  # they hold less


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_below_the_cache_is_fetched(family: str) -> None:
    chosen, plain = expected(family)
    engine = tiny_engine(
        family, num_blocks=13, max_context=352, max_step_tokens=64, kv_host_memory=2**24
    )
    for _ in range(2):
        assert answers(engine, PROMPTS + PROMPTS, PARAMS + PLAIN) == chosen + plain
    engine.close()


@pytest.mark.parametrize("level", _cpu.available())
def test_vector_width(level: str) -> None:
    engine = tiny_engine("llama", ops=provider("cpu", 1, level), max_step_tokens=50)
    assert answers(engine, PROMPTS, PARAMS) == expected("llama")[0]


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_not_chosen_is_given_back(family: str) -> None:
    engine = tiny_engine(family, max_step_tokens=64, speculation="off")
    held: list[int] = []
    ids, params = prompt(3, 300), keeps(128, max_tokens=40)
    engine.add(ids, params)
    pool = engine.scheduler.kv.pools[0]
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
        held.append(pool.num_blocks - pool.num_free)
    # Of its ten blocks four are kept; the answer begins in the last of them, and fills another.
    assert held[:4] == [2, 4, 6, 8] and held[4:-1] == [4] * 21 + [5] * 18 and held[-1] == 0


def fits(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> int:
    """How many run at once at most, behind their prompts."""
    for ids, one in zip(prompts, params, strict=True):
        engine.add(ids, one)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.scheduler.num_running)
    return most


def test_more_requests_fit_into_the_cache() -> None:
    prompts = [prompt(i, 300) for i in range(6)]
    options: dict[str, Any] = {"num_blocks": 24, "max_context": 352, "prefix_cache": False}
    narrow = fits(tiny_engine(**options), prompts, [keeps(96, max_tokens=50)] * 6)
    everything = fits(tiny_engine(**options), prompts, [keeps(None, max_tokens=50)] * 6)
    assert narrow >= 4 > everything == 2


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "why"),
    [("llama4", "chunks"), ("deepseek_v32", "chooses"), ("glm_moe_dsa", "choose")],
)
def test_models_that_take_no_budget_say_why(family: str, why: str) -> None:
    engine = tiny_engine(family)
    with pytest.raises(InputError, match=why + ".*leave attention_budget out") as error:
        engine.add([1, 2], keeps(64))
    assert error.value.field == "attention_budget"


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="KV cache") as error:
        tiny_engine(num_blocks=4).add(prompt(1, 300), keeps(64))
    assert error.value.field == "prompt"


@pytest.mark.parametrize("values", [0, 64.0, True])
def test_parameters_out_of_range(values: Any) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(attention_budget=values)
    assert error.value.field == "attention_budget"
    with pytest.raises(InputError, match="exclude each other"):
        SamplingParams(attention_budget=64, attention_window=64)
