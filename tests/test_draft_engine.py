"""An engine that loads a draft model: the same answers, its memory, what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from drafting import rows_for
from elinvar.base.config import EngineConfig
from elinvar.base.errors import InputError, ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.draft_model import SHARE, Loaded, drafter_of, same_ids
from elinvar.run.drafters.aside import Aside
from elinvar.run.drafters.model import DraftModel
from elinvar.run.drafters.retokenised import Retokenised
from engines import Answer, ByteTokenizer, answers, provider, tiny_model
from families.base import VOCAB
from oracles import verify_all

SIZE: dict[str, Any] = {"kv_memory": 2**26, "max_context": 512, "max_rows": 4}


def test_its_cache_is_bounded() -> None:
    tokenizer: Any = ByteTokenizer()
    loaded = Loaded(tiny_model(provider(), "gemma3"), tokenizer, provider())
    rows, config = rows_for(), EngineConfig()
    drafter = drafter_of(loaded, rows, tokenizer, VOCAB, SHARE * 2**19, config)
    assert isinstance(drafter, DraftModel)
    assert sum(layer.blocks.nbytes for layer in drafter._lanes.kv[:1]) <= 2**19


def test_what_cannot_draft_is_refused() -> None:
    tokenizer: Any = ByteTokenizer()
    loaded = Loaded(tiny_model(provider(), "qwen3_next"), tokenizer, provider())
    with pytest.raises(ModelError, match="draft_model"):
        drafter_of(loaded, rows_for(), tokenizer, VOCAB, 2**26, EngineConfig())
    with pytest.raises(InputError, match="give a draft_model"):
        EngineConfig(speculation="aside,suffix")
    with pytest.raises(InputError, match="speculation is off"):
        EngineConfig(speculation="off", draft_model="x")
    assert not EngineConfig(speculation="suffix", draft_model="x").uses_draft_model


def real_answer(path: Path, **options: Any) -> tuple[Answer, Engine]:
    config = EngineConfig(**{**SIZE, "speculation": "off", **options})
    engine = Engine.load(path, config)
    ids = engine.tokenizer.encode("One, two, three, four, five, six,")
    params = SamplingParams(max_tokens=24, temperature=0.6, seed=5, ignore_eos=True)
    return answers(engine, [ids], [params])[0], engine


def test_real_models(smollm2_gguf: Path, gemma_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model, one with another tokenizer, and one in a process of its own."""
    want, engine = real_answer(smollm2_gguf)
    engine.close()
    verify_all(monkeypatch)
    for options, kind in (
        ({"draft_model": str(smollm2_gguf), "speculation": "model"}, DraftModel),
        ({"draft_model": str(gemma_gguf), "speculation": "model"}, Retokenised),
        ({"draft_model": str(smollm2_gguf), "speculation": "aside"}, Aside),
    ):
        found, engine = real_answer(smollm2_gguf, **options)
        assert found == want
        (source,) = engine.runner.speculator._sources
        assert isinstance(source.drafter, kind)
        if kind is DraftModel:
            assert source.stats.num_accepted == source.stats.num_drafted > 0
        if isinstance(source.drafter, Aside):
            _until_it_helps(engine, source.drafter, want)
        engine.close()


def _until_it_helps(engine: Engine, drafter: Aside, want: Answer) -> None:
    end = time.monotonic() + 120
    while not engine.runner.speculator.stats[0].num_accepted:
        assert drafter.is_alive and time.monotonic() < end
        ids = engine.tokenizer.encode("One, two, three, four, five, six,")
        params = SamplingParams(max_tokens=24, temperature=0.6, seed=5, ignore_eos=True)
        assert answers(engine, [ids], [params])[0] == want


def test_versions_of_one_tokenizer_are_the_same() -> None:
    class Renamed(ByteTokenizer):
        def spellings(self, count: int) -> list[bytes]:
            return [*super().spellings(count)[:-2], b"<new>", b"<newer>"][:count]

    class Other(ByteTokenizer):
        def spellings(self, count: int) -> list[bytes]:
            return super().spellings(count)[::-1]

    one: Any = ByteTokenizer()
    renamed: Any = Renamed()
    other: Any = Other()
    assert same_ids(one, renamed) and not same_ids(one, other)
