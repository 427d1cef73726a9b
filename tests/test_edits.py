"""What changes logits before a token is chosen: its meaning against transformers, and the contract:
with all of it, tokens and log-probs are a function of the request alone, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.errors import InputError
from elinvar.base.plan import RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.engine.bad_words import spelled
from elinvar.ops import SampleArgs
from elinvar.ops.ref_sample import edited, typical
from elinvar.run.edits import RowEdits, edit
from engines import EOS, VOCAB, Answer, answers, tiny_engine

FAMILIES = ("llama", "gemma3", "qwen3_next")


def prompt(number: int, length: int) -> list[int]:
    return [(number * 31 + i * i * 7 + i) % VOCAB for i in range(length)]


PROMPTS = [prompt(1, n) for n in (1, 33, 97, 150)] + [prompt(1, 64) + prompt(2, 50), prompt(3, 45)]
ALL = SamplingParams(
    max_tokens=30,
    temperature=0.9,
    top_k=60,
    top_p=0.95,
    min_p=0.01,
    typical_p=0.9,
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=-0.4,
    logit_bias=((65, 4.0), (66, 3.5), (EOS, 5.0)),
    bad_words=("AB", "q", (70, 71, 72)),
    min_tokens=9,
    seed=5,
    logprobs=3,
    stop="B!",
)
PARAMS = [
    ALL,
    replace(ALL, temperature=0.0),
    SamplingParams(max_tokens=25, repetition_penalty=1.2, seed=1, logprobs=0, ignore_eos=True),
    SamplingParams(max_tokens=20, frequency_penalty=2.0, temperature=0, seed=0, logprobs=1),
    SamplingParams(max_tokens=20, typical_p=0.3, seed=8, logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=9, logprobs=1),
]
_alone: dict[str, list[Answer]] = {}


def expected(family: str) -> list[Answer]:
    if family not in _alone:
        engine = tiny_engine(family, prefix_cache=False)
        pairs = zip(PROMPTS, PARAMS, strict=True)
        _alone[family] = [answers(engine, [p], [s])[0] for p, s in pairs]
    return _alone[family]


@pytest.mark.parametrize("chunk", [1, 21, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_chunks_and_cached_prefixes(family: str, chunk: int) -> None:
    engine = tiny_engine(family, max_step_tokens=chunk)
    for _ in range(2):
        assert answers(engine, PROMPTS, PARAMS) == expected(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str) -> None:
    """Counts of what was said come back with the tokens."""
    engine = tiny_engine(family, max_step_tokens=40)
    ids = [engine.add(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
    got: dict[str, list[Any]] = {i: [[], [], ""] for i in ids}
    live, steps = list(ids), 0
    while engine.has_work:
        for delta in engine.step():
            mine = got[delta.request_id]
            mine[0] += delta.token_ids
            mine[1] += delta.logprobs
            mine[2] += delta.text
            if delta.finish_reason:
                live.remove(delta.request_id)
        if len(live) > 1 and steps % 3 == 0:
            engine.scheduler.preempt(live[1 + steps // 3 % (len(live) - 1)])
        steps += 1
    assert engine.metrics.preemptions > 5
    assert [tuple(got[i]) for i in ids] == expected(family)


# ---- what it means ------------------------------------------------------------------------------


def logits_after(tokens: list[int], num_prompt: int, params: SamplingParams, row: Any) -> Any:
    """The edited logits that follow `tokens`."""
    one = np.ones(1, np.float32)
    args = SampleArgs(
        np.zeros(1, np.uint64), np.zeros(1, np.int32), one, np.zeros(1, np.int32), one, one, 0
    )
    start = RowStart("r", 0, tokens, params, [], -1, num_prompt, frozenset([EOS, 7]))
    edit(args, [RowEdits(start)], [np.array(tokens, np.int32)])
    return edited(row.astype(np.float64), 0, args)


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=25)
WORDS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), max_size=4)


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.floats(0.1, 3.0), WORDS, st.integers(0, 12), st.integers(0, 24))
def test_as_transformers(
    tokens: list[int], penalty: float, words: list[Any], min_tokens: int, num_prompt: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    num_prompt = min(num_prompt, len(tokens))
    row = np.random.default_rng(len(tokens)).normal(0, 4, 300).astype(np.float32)
    ids, scores = torch.tensor([tokens]), torch.tensor(row[None])
    processors = [transformers.RepetitionPenaltyLogitsProcessor(penalty)]
    if words:
        bad = [list(word) for word in set(words)]
        processors.append(transformers.NoBadWordsLogitsProcessor(bad, []))
    ends = [7, EOS]
    least = transformers.MinNewTokensLengthLogitsProcessor(num_prompt, min_tokens, ends)
    for process in (*processors, least):
        scores = process(ids, scores)
    params = SamplingParams(
        max_tokens=50, repetition_penalty=penalty, bad_words=words, min_tokens=min_tokens
    )
    got = logits_after(tokens, num_prompt, params, row)
    assert np.allclose(got, scores[0].double().numpy(), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 2**31), st.floats(0.3, 5.0))
def test_typical_as_transformers(typical_p: float, seed: int, spread: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    row = np.random.default_rng(seed).normal(0, spread, 200)
    warper = transformers.TypicalLogitsWarper(typical_p)
    kept = warper(torch.tensor([[0]]), torch.tensor(row[None]))[0]
    ours = typical(row - row.max(), typical_p)
    assert sorted(ours.tolist()) == torch.isfinite(kept).nonzero()[:, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 24))
def test_presence_and_frequency_are_openais(
    tokens: list[int], presence: float, frequency: float, num_prompt: int
) -> None:
    num_prompt = min(num_prompt, len(tokens))
    row = np.random.default_rng(1).normal(0, 4, 300).astype(np.float32)
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, logit_bias={3: 50, 8: -1.5}
    )
    got = logits_after(tokens, num_prompt, params, row)
    for token in range(12):
        count = tokens[num_prompt:].count(token)
        want = row[token] - count * frequency - (count > 0) * presence
        assert got[token] == pytest.approx(
            want + {3: 50, 8: -1.5}.get(token, 0), rel=1e-5, abs=1e-5
        )


def test_a_bias_decides_and_what_is_told_is_the_models() -> None:
    engine = tiny_engine()
    base = {"max_tokens": 6, "temperature": 0.8, "seed": 3, "logprobs": 20, "ignore_eos": True}
    plain, biased = answers(
        engine,
        [prompt(1, 40)] * 2,
        [SamplingParams(**base), SamplingParams(**base, logit_bias={77: 100})],
    )
    assert biased[0] == [77] * 6
    assert biased[1][0].top == plain[1][0].top
    assert biased[1][0].logprob <= 0


def test_no_end_before_min_tokens() -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=30, temperature=0, logit_bias={EOS: 100, 90: 50})
    assert answers(engine, [prompt(1, 9)], [params])[0][0] == [EOS]
    later = replace(params, min_tokens=5, stop_token_ids=(90,), stop="ZZ")
    ids, _, _ = answers(engine, [prompt(1, 9)], [later])[0]
    assert len(ids) == 6 and ids[-1] == EOS and 90 not in ids
    # A stop text counts from then on.
    letters = replace(params, logit_bias={90: 100}, min_tokens=5, stop="ZZ")
    ids, _, text = answers(engine, [prompt(1, 9)], [letters])[0]
    assert (ids, text) == ([90] * 7, "ZZZZZ")


def test_bad_words_are_not_said() -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=12, temperature=0, logit_bias={65: 100, 66: 70, 67: 40})
    assert answers(engine, [prompt(1, 9)], [params])[0][2] == "A" * 12
    banned = replace(params, bad_words=("AAA", "AABB"))
    text = answers(engine, [prompt(1, 9)], [banned])[0][2]
    assert "AAA" not in text and "AABB" not in text and text.startswith("AAB")
    # What the prompt began may not be ended either.
    begun = answers(engine, [[*prompt(1, 9), 65, 65]], [banned])[0][2]
    assert begun.startswith("B")


def test_the_end_text_may_stay() -> None:
    engine = tiny_engine()
    base = SamplingParams(max_tokens=9, temperature=0, logit_bias={65: 100}, stop="AA")
    kept = replace(base, include_stop_str_in_output=True)
    by_id = replace(base, stop=(), stop_token_ids=(65,))
    params = [base, kept, by_id, replace(by_id, include_stop_str_in_output=True)]
    texts = [text for _, _, text in answers(engine, [prompt(1, 9)] * 4, params)]
    assert texts == ["", "AA", "", "A"]


def test_control_tokens_have_a_text_where_they_are_not_skipped() -> None:
    engine = tiny_engine()
    base = SamplingParams(max_tokens=2, temperature=0, logit_bias={EOS: 100}, ignore_eos=True)
    params = [base, replace(base, skip_special_tokens=False)]
    texts = [text for _, _, text in answers(engine, [prompt(1, 9)] * 2, params)]
    assert texts == ["", "<end><end>"]


class Words:
    """Spells as SentencePiece does: a text begins with a space, and a word after one is a token."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        pieces = f" {text}".replace(" ", "_").replace("_cat", "1").replace("cat", "2")
        return [ord(piece) for piece in pieces]


def test_bad_words_are_spelled_in_each_way() -> None:
    tokenizer: Any = Words()
    one, two, space = ord("1"), ord("2"), ord("_")
    assert spelled(tokenizer, ["cat", (5, 6)]) == ((one,), (space, one), (two,), (5, 6))


def test_as_many_bad_words_as_there_may_be() -> None:
    words = [chr(0x10000 + i) * 256 for i in range(256)]
    params = SamplingParams(max_tokens=3, seed=1, bad_words=words)
    assert len(answers(tiny_engine(), [[1, 2]], [params])[0][0]) <= 3


@pytest.mark.parametrize(
    ("over", "field"),
    [
        ({"typical_p": 0.0}, "typical_p"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": [(1, 2), (1, 3)]}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(2000), 1)}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [["a"]]}, "bad_words"),
        ({"bad_words": 5}, "bad_words"),
        ({"bad_words": ["x"] * 500}, "bad_words"),
        ({"bad_words": ["x" * 500]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 10, "max_tokens": 9}, "min_tokens"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"skip_special_tokens": None}, "skip_special_tokens"),
    ],
)
def test_refusals_name_the_field(over: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field) as caught:
        SamplingParams(**over)
    assert caught.value.field == field


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    engine = tiny_engine()
    for field, value in (("logit_bias", {VOCAB: 1.0}), ("bad_words", [[1, VOCAB]])):
        with pytest.raises(InputError, match=f"{field} must be from 0 to {VOCAB - 1}"):
            engine.add([1], SamplingParams(**{field: value}))
    ends = SamplingParams(max_tokens=3, min_tokens=2, stop_token_ids=(2**31 - 1,), seed=1)
    assert len(answers(engine, [[1]], [ends])[0][0]) <= 3
