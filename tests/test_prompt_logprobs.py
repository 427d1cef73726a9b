"""Log-probs of prompts: equal to the bit to those of generating the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters import adapted_engine
from elinvar.base.errors import InputError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.llm import LLM
from elinvar.engine.output import CompletionBuilder
from elinvar.models.registry import FAMILIES as REGISTRY
from elinvar.run import score
from engines import VOCAB, provider, tiny_engine
from sweeps import CPUS, REF, normal, same

GENERATE = SamplingParams(max_tokens=40, temperature=1.1, seed=4, logprobs=4, ignore_eos=True)
SCORE = SamplingParams(max_tokens=1, temperature=0, seed=0, prompt_logprobs=4)
PROMPT = [(i * i * 7 + i) % VOCAB for i in range(70)]


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_a_sequence_as_a_prompt_has_the_log_probs_of_its_generation(family: str) -> None:
    said = LLM(tiny_engine(family, prefix_cache=False)).generate(PROMPT, GENERATE)[0]
    engine = tiny_engine(family, ops=provider(num_threads=3), max_step_tokens=23)
    llm = LLM(engine)
    llm.generate(PROMPT, GENERATE)  # cached, and yet computed
    whole = PROMPT + said.token_ids
    first, again = llm.generate([whole, whole], SCORE)
    assert first.prompt_logprobs == again.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(whole) - 1
    assert first.prompt_logprobs[len(PROMPT) - 1 :] == said.logprobs
    assert first.num_cached_tokens == 0


@pytest.mark.parametrize("chunk", [2, 31, 32, 500])
@pytest.mark.parametrize("most", [1, VOCAB * 5, 2**22])
def test_chunks_pieces_and_neighbours(
    chunk: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = LLM(tiny_engine()).generate(PROMPT, SCORE)[0]
    monkeypatch.setattr(score, "MOST_LOGITS", most)
    llm = LLM(tiny_engine(max_step_tokens=chunk))
    params = [GENERATE, SCORE, replace(SCORE, prompt_logprobs=0), replace(GENERATE, temperature=0)]
    _, scored, few, _ = llm.generate([PROMPT, PROMPT, PROMPT[:5], PROMPT[3:]], params)
    assert scored.prompt_logprobs == alone.prompt_logprobs
    assert alone.prompt_logprobs is not None and few.prompt_logprobs is not None
    wanted = [one.logprob for one in alone.prompt_logprobs[:4]]
    assert [one.logprob for one in few.prompt_logprobs] == wanted


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_preemption(family: str, prefix_cache: bool) -> None:
    wanted = LLM(tiny_engine(family)).generate(PROMPT, replace(SCORE, max_tokens=8))[0]
    engine = tiny_engine(family, max_step_tokens=11, prefix_cache=prefix_cache)
    request = engine.add(PROMPT, replace(SCORE, max_tokens=8))
    builder, done, steps = CompletionBuilder(PROMPT), None, 0
    while done is None:
        for delta in engine.step():
            done = builder.push(delta) or done
        steps += 1
        if steps in (3, 9, 13):
            engine.scheduler.preempt(request)
    assert (done.prompt_logprobs, done.token_ids) == (wanted.prompt_logprobs, wanted.token_ids)


def test_a_prompt_of_one_token_has_none() -> None:
    done = LLM(tiny_engine()).generate([[5], [5, 6]], replace(SCORE, max_tokens=3))
    assert done[0].prompt_logprobs == []
    assert [one.prompt_logprobs is None for one in done] == [False, False]
    assert LLM(tiny_engine()).generate([5, 6], GENERATE)[0].prompt_logprobs is None
    with pytest.raises(InputError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=21)


def test_beside_adapters() -> None:
    llm = LLM(adapted_engine(max_step_tokens=23))
    names = ["one", "two", None]
    said = llm.generate([PROMPT] * 3, [replace(GENERATE, adapter=name) for name in names])
    assert len({tuple(one.token_ids) for one in said}) == 3
    whole = [PROMPT + one.token_ids for one in said]
    scored = llm.generate(whole, [replace(SCORE, adapter=name) for name in names])
    for done, wanted in zip(scored, said, strict=True):
        assert done.prompt_logprobs is not None
        assert done.prompt_logprobs[len(PROMPT) - 1 :] == wanted.logprobs


@pytest.mark.parametrize("vocab", [17, 1000, 49152])
def test_score(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = normal(rng, 9, vocab) * 4
    ids = rng.integers(0, vocab, 9).astype(np.int32)
    wanted, results = REF.score(logits, ids, 3), [o.score(logits, ids, 3) for o in CPUS.values()]
    for field in ("logprobs", "top_ids", "top_logprobs"):
        same([getattr(r, field) for r in results])
        assert np.abs(getattr(results[0], field) - getattr(wanted, field)).max() < 2e-5


def test_a_real_model(smollm2_gguf: Path) -> None:
    from elinvar.base.config import EngineConfig

    engine = Engine.load(str(smollm2_gguf), EngineConfig(kv_memory=2**28, max_step_tokens=64))
    llm = LLM(engine)
    said = llm.generate("The capital of France is", replace(GENERATE, max_tokens=100))[0]
    whole = said.prompt_token_ids + said.token_ids
    scored = llm.generate([whole], SCORE)[0].prompt_logprobs
    assert scored is not None
    assert scored[len(said.prompt_token_ids) - 1 :] == said.logprobs
