"""Beam search: as transformers', and the same answers however it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import InputError
from elinvar.base.plan import TokenLogprobs
from elinvar.base.sampling import SamplingParams
from elinvar.engine.beam import BeamParams, BeamSearch
from elinvar.engine.llm import LLM
from elinvar.ops import load_provider
from engines import VOCAB, tiny_engine

PROMPT = [(i * i * 7 + i) % VOCAB for i in range(70)]


def found(llm: LLM, params: BeamParams, prompt: list[int] = PROMPT) -> list[Any]:
    return [(one.token_ids, one.logprobs) for one in llm.beam_search([prompt], params)[0]]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("width", [2, 5])
def test_as_transformers(width: int, length_penalty: float, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from test_models_tiny import load_f32, make_reference, prompt, save

    reference = make_reference("llama")
    save("llama", reference, tmp_path)
    llm = LLM(tiny_engine(model=load_f32(tmp_path, load_provider("cpu")), kv_dtype="f32"))
    ends = tuple(range(0, 90, 6))
    params = BeamParams(width, 9, length_penalty, stop_token_ids=ends, ignore_eos=True)
    for seed in range(3):
        start = prompt(seed, 20)
        with torch.no_grad():
            theirs = reference.generate(
                torch.tensor([start]),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=9,
                length_penalty=length_penalty,
                early_stopping="never",
                eos_token_id=list(ends),
                pad_token_id=2,
                do_sample=False,
            )
        wanted = [
            ids[: 1 + next((i for i, t in enumerate(ids) if t in ends), 9)]
            for ids in theirs[:, len(start) :].tolist()
        ]
        assert [ids for ids, _ in found(llm, params, list(start))] == wanted


def test_one_beam_is_greedy() -> None:
    llm = LLM(tiny_engine())
    greedy = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0, seed=0, logprobs=3))
    (beam,) = llm.beam_search(PROMPT, BeamParams(1, 12, 0.0, logprobs=3))[0]
    assert beam == replace(greedy[0], num_cached_tokens=beam.num_cached_tokens)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_batches_chunks_and_cached_prefixes(family: str) -> None:
    params = BeamParams(4, 10, logprobs=2)
    wanted = found(LLM(tiny_engine(family, prefix_cache=False)), params)
    assert len(wanted) == 4
    llm = LLM(tiny_engine(family, max_step_tokens=13, max_rows=3))
    assert found(llm, params) == wanted
    both = llm.beam_search([PROMPT[:33], PROMPT], params)
    assert [(one.token_ids, one.logprobs) for one in both[1]] == wanted
    # Each step computes a token a beam: the rest is there.
    before = llm.engine.metrics.computed_tokens
    found(llm, params)
    most = 1 + 9 * 4 if family != "qwen3_next" else 10_000
    assert llm.engine.metrics.computed_tokens - before <= most


def test_it_stops_where_nothing_can_become_better() -> None:
    search = BeamSearch(BeamParams(1, 50, 0.0), {7})
    search.push([TokenLogprobs(0.0, [(7, -0.5), (1, -1.0)])])
    assert search.done and search.best(1)[0].token_ids == (7,)
    longer = BeamSearch(BeamParams(1, 50, 1.0), {7})
    longer.push([TokenLogprobs(0.0, [(7, -0.5), (1, -1.0)])])
    assert [beam.token_ids for beam in longer.live] == [(1,)]


def test_equal_beams_go_by_their_order() -> None:
    search = BeamSearch(BeamParams(2, 50), set())
    search.push([TokenLogprobs(0.0, [(5, -1.0), (9, -1.0), (3, -2.0)])])
    assert [beam.token_ids for beam in search.live] == [(5,), (9,)]
    search.push([TokenLogprobs(0.0, [(1, -1.0), (8, -1.0)])] * 2)
    assert [beam.token_ids for beam in search.live] == [(5, 1), (5, 8)]


def test_the_context_ends_it() -> None:
    llm = LLM(tiny_engine(max_context=80))
    answers = llm.beam_search(PROMPT, BeamParams(2, 200, ignore_eos=True))[0]
    assert {len(one.token_ids) for one in answers} == {10}
    with pytest.raises(InputError, match="prompt"):
        llm.beam_search(list(range(80)), BeamParams(2))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"width": 0}, "width"),
        ({"width": 11}, "width"),
        ({"width": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"width": 2, "length_penalty": 10.5}, "length_penalty"),
        ({"width": 2, "logprobs": 21}, "logprobs"),
        ({"width": 2, "max_tokens": 0}, "max_tokens"),
    ],
)
def test_refusals(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as info:
        BeamParams(**fields)
    assert info.value.field == field


@pytest.mark.parametrize("penalty", [-10.0, 10.0])
def test_penalties_of_the_longest_answers(penalty: float) -> None:
    search = BeamSearch(BeamParams(1, 2**31 - 1, penalty), {0})
    search.push([TokenLogprobs(-0.1, [(0, -0.1), (1, -2.0)])])
    assert search.best(1)[0].token_ids == (0,)


def test_the_best_of_several_answers() -> None:
    llm = LLM(tiny_engine())
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=3, logprobs=0)
    every = llm.generate([PROMPT, PROMPT[:9]], params, n=5)
    kept = llm.generate([PROMPT, PROMPT[:9]], params, n=2, best_of=5)

    def mean(one: Any) -> float:
        return sum(told.logprob for told in one.logprobs) / len(one.logprobs)

    for prompt in range(2):
        mine = sorted(every[5 * prompt : 5 * prompt + 5], key=mean, reverse=True)[:2]
        assert [one.token_ids for one in kept[2 * prompt :][:2]] == [o.token_ids for o in mine]
    with pytest.raises(InputError, match="best_of"):
        llm.generate(PROMPT, params, n=3, best_of=2)
