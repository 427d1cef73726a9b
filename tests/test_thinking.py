"""A thought ends where its budget does, by a rule of the answer's tokens alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar.base.errors import InputError
from elinvar.base.grammar import JsonSchema, Regex, Sequence, Special, Until
from elinvar.base.sampling import SamplingParams
from elinvar.base.thinking import ThinkingBudget
from elinvar.run.thinking import ThinkingState
from engines import VOCAB, answers, tiny_engine

BUDGETS = [
    ThinkingBudget(3, end=(9,), is_open=True),
    ThinkingBudget(0, end=(1, 1, 2), begin=(3,)),
    ThinkingBudget(4, end=(1, 2, 1, 3), begin=(2, 2), is_open=True),
]
tokens = st.lists(st.sampled_from([1, 2, 3, 9]), max_size=40)


def thoughts(budget: ThinkingBudget, answer: list[int]) -> list[list[int]]:
    """The obvious way: look for markers from where the last one ended."""
    found, at, begun = [], 0, 0 if budget.is_open else None
    for end in range(1, len(answer) + 1):
        marker = budget.end if begun is not None else budget.begin
        start = end - len(marker)
        if not marker or start < at or tuple(answer[start:end]) != marker:
            continue
        if begun is not None:
            found.append(answer[begun:start])
        begun, at = (None if begun is not None else end), end
    return found + ([answer[begun:]] if begun is not None else [])


@pytest.mark.parametrize("budget", BUDGETS)
@given(tokens=tokens, cut=st.integers(0, 40))
def test_no_thought_is_longer_however_the_tokens_are_told(
    budget: ThinkingBudget, tokens: list[int], cut: int
) -> None:
    state, answer = ThinkingState(budget), list[int]()
    for token in tokens:
        answer.append(token if state.forced is None else state.forced)
        state.read(answer[-1:])
    parts = ThinkingState(budget)
    parts.read(answer[:cut])
    parts.read(answer[cut:])
    assert (parts.forced, parts.thinks) == (state.forced, state.thinks)
    found = thoughts(budget, answer)
    whole = found[:-1] if state.thinks else found
    assert sum(map(len, whole)) <= budget.max_tokens
    assert state.num_thought == sum(map(len, found))


def test_what_is_not_forced_is_what_it_would_have_been() -> None:
    free = SamplingParams(max_tokens=24, seed=4, logprobs=2, ignore_eos=True)
    short = SamplingParams(
        max_tokens=24,
        seed=4,
        logprobs=2,
        ignore_eos=True,
        thinking=ThinkingBudget(6, end=(77, 78), is_open=True),
    )
    [(ids, logprobs, _)] = answers(tiny_engine(), [[1, 2, 3]], [free])
    [(own, own_logprobs, _)] = answers(tiny_engine(), [[1, 2, 3]], [short])
    assert own[:6] == ids[:6] and own_logprobs[:6] == logprobs[:6]
    assert own[6:8] == [77, 78]
    assert own_logprobs[6].logprob < 0  # of the model, whatever was forced


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_the_bits_are_those_of_a_request_alone(family: str) -> None:
    prompts = [[(7 * i + j * j) % VOCAB for j in range(20 + 9 * i)] for i in range(6)]
    params = [
        SamplingParams(
            max_tokens=60,
            seed=i,
            temperature=0.9,
            logprobs=1,
            ignore_eos=True,
            thinking=None
            if i == 2
            else ThinkingBudget(5 * i, end=(9, 9), begin=(i,), is_open=i < 5),
        )
        for i in range(6)
    ]
    wanted = [
        answers(tiny_engine(family, prefix_cache=False), [p], [s])[0]
        for p, s in zip(prompts, params, strict=True)
    ]
    tight = tiny_engine(family, num_blocks=8, max_context=160, max_step_tokens=40)
    assert answers(tight, prompts, params) == wanted
    assert tight.metrics.preemptions > 0


def test_a_grammar_decides_where_a_thought_can_end() -> None:
    """Here a token is a byte, and a control token may not stand amid a character."""
    grammar = Sequence((Until(Special("<258>")), Regex("[a-z]{3}")))
    budget = ThinkingBudget(6, end=(258,), begin=(257,), is_open=True)
    params = [
        SamplingParams(max_tokens=40, seed=seed, grammar=grammar, thinking=budget)
        for seed in range(20)
    ]
    lengths = set()
    for ids, _, _ in answers(tiny_engine(), [[7 + i] * 9 for i in range(20)], params):
        length = ids.index(258)
        lengths.add(length)
        bytes(ids[:length]).decode()
        assert len(ids) == length + 5
    assert 6 < max(lengths) <= 9


def test_a_grammar_without_a_thought_has_the_last_word() -> None:
    closed = ThinkingBudget(0, end=(258,), begin=(257,), is_open=True)
    for grammar, wanted in ((Regex("ab"), "ab"), (JsonSchema('{"const": 1}'), "1")):
        params = SamplingParams(max_tokens=9, seed=1, grammar=grammar, thinking=closed)
        assert answers(tiny_engine(), [[7] * 9], [params])[0][2] == wanted


def test_a_budget_that_could_not_be_kept_is_refused() -> None:
    for budget in ({"max_tokens": -1, "end": (1,)}, {"max_tokens": 1, "end": ()}):
        with pytest.raises(InputError, match=r"thought|max_thinking_tokens"):
            ThinkingBudget(**budget, is_open=True)  # type: ignore[arg-type]
    thinking = ThinkingBudget(1, end=(VOCAB,), is_open=True)
    with pytest.raises(InputError, match="ends a thought"):
        tiny_engine().add([1], SamplingParams(thinking=thinking))
